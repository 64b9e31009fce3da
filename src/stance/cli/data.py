"""``stance validate`` and ``stance agreement``: annotated files, before any model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stance.cli.options import SetOption, TextOrJson
from stance.errors import DataError, UsageError

if TYPE_CHECKING:
    from stance.annotations import Statement
    from stance.config import Config

__all__ = ["agreement", "validate"]


def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILES", help="Annotated files, folders or globs.")],
    config: Annotated[
        Path | None, typer.Option(help="Take tasks, columns and split column from this config.")
    ] = None,
    overrides: SetOption = None,
    format: Annotated[TextOrJson, typer.Option(help="How to print the findings.")] = TextOrJson.text,
    tokens: Annotated[
        bool, typer.Option(help="Count tokens with the config's encoder (loads its tokenizer).")
    ] = True,
) -> None:
    """Audit annotated files: bad rows, duplicates, conflicting labels, leakage, label counts, lengths."""
    from stance.audit import audit
    from stance.config import Config, load_config
    from stance.records import expand_files

    if overrides and not config:
        raise UsageError("--set needs --config - give the config to override")
    settings = (
        load_config(config, overrides or [])
        if config
        else Config.model_validate({"output_dir": "-", "data": {"files": ["-"]}})
    )
    paths = expand_files(files)
    split = settings.data.split.column
    result = audit(
        paths,
        settings.task_list,
        columns=settings.data.columns,
        split_column=split,
        token_count=_token_counter(settings) if tokens else None,
        max_length=settings.data.max_length,
    )
    if format is TextOrJson.json:
        print(json.dumps(result.to_dict(), indent=2, ensure_ascii=False))
    else:
        _print_audit(result.to_dict())
    if result.errors:
        raise DataError(f"{result.errors} errors in {len(paths)} files - see the findings above")


def _token_counter(config: Config) -> Any:
    def count(statements: Sequence[Statement]) -> list[int]:
        from stance.model import encode_pairs, load_tokenizer, quiet_transformers

        quiet_transformers()
        tokenizer = load_tokenizer(config.model.encoder, config.model.revision)
        pairs = [(s.speaker, s.context, s.text) for s in statements]
        if not pairs:
            return []
        mark = config.model.mark_speaker
        return [len(ids) for ids in encode_pairs(tokenizer, pairs, 1_000_000, mark_speaker=mark)["input_ids"]]

    return count


def _print_audit(result: dict[str, Any]) -> None:
    print(f"{result['rows']} usable rows")
    for name, value in result["counts"].items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"  {name}: {shown}")
    for finding in result["findings"]:
        where = f"{finding['where']}: " if finding["where"] else ""
        print(f"{finding['level']} [{finding['code']}] {where}{finding['message']}")
    summary = result["summary"]
    print(f"{summary['error']} errors, {summary['warning']} warnings, {summary['info']} infos")


def agreement(
    files: Annotated[list[str], typer.Argument(metavar="FILES", help="Annotated files, folders or globs.")],
    config: Annotated[Path | None, typer.Option(help="Take tasks and columns from this config.")] = None,
    format: Annotated[TextOrJson, typer.Option(help="How to print the result.")] = TextOrJson.text,
    list_disagreements: Annotated[
        bool, typer.Option("--list", help="List the statements on which annotators disagree.")
    ] = False,
) -> None:
    """Report the agreement between annotators before adjudication: alpha, kappa, raw agreement."""
    from stance.annotations import agreement as compute
    from stance.annotations import load_statements
    from stance.config import load_config
    from stance.labels import DEFAULT_TASKS

    settings = load_config(config) if config else None
    tasks = settings.task_list if settings else DEFAULT_TASKS
    columns = settings.data.columns if settings else None
    report = compute(load_statements(files, tasks, columns), tasks)
    if format is TextOrJson.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    _print_agreement(report, list_disagreements)


def _print_agreement(report: dict[str, Any], list_disagreements: bool) -> None:
    def figure(value: float | None) -> str:
        return "    -" if value is None else f"{value:5.3f}"

    print(f"{report['n']} rows with two or more annotators")
    for name, entry in report["tasks"].items():
        low, high = entry["alpha_interval"]
        print(
            f"{name}: alpha {figure(entry['alpha'])} [{figure(low)}, {figure(high)}], "
            f"kappa {figure(entry['kappa'])}, raw {figure(entry['raw'])} (n {entry['n']})"
        )
        for column, values in entry["by"].items():
            for value, part in values.items():
                alpha, raw = figure(part["alpha"]), figure(part["raw"])
                print(f"  {column} {value}: alpha {alpha}, raw {raw} (n {part['n']})")
    print(f"{len(report['disagreements'])} disagreements")
    if list_disagreements:
        for d in report["disagreements"]:
            codes = ", ".join(f"{a} {label}" for a, label in d["codes"].items())
            print(f"{d['where']}: {d['task']}: {codes} | {d['speaker'] or '-'}: {d['text']}")
