"""What the README and the configs say is true: their commands run, their keys load."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, corpus_rows, write_jsonl
from stance.config import Config, load_config
from stance.export import export
from stance.labels import DIALOGUE, STANCES
from stance.records import read_records

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads(path):
    load_config(path)


def test_the_default_config_names_every_key():
    def keys(tree, prefix=""):
        for key, value in tree.items():
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from keys(value, f"{prefix}{key}.")

    written = yaml.safe_load((ROOT / "configs" / "default.yaml").read_text(encoding="utf-8"))
    every = Config.model_validate({"output_dir": "x", "data": {"files": ["x"]}}).model_dump(mode="json")
    assert set(keys(written)) == set(keys(every))


def test_the_default_config_holds_the_defaults():
    written = load_config(ROOT / "configs" / "default.yaml").model_dump(mode="json")
    defaults = Config.model_validate({"output_dir": "x", "data": {"files": ["x"]}}).model_dump(mode="json")
    written["output_dir"], written["data"]["files"] = "x", ["x"]
    assert written["data"]["split"].pop("column") == "split"  # as its comment says, the corpus' own
    assert defaults["data"]["split"].pop("column") is None
    assert written == defaults


def test_nothing_is_left_to_fill_in():
    for path in [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "data/annotations").glob("*.md"),
    ]:
        assert not re.search(r"\bFIG|TODO|XXX", path.read_text(encoding="utf-8")), path.name


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, trained):
    """A folder as a new user has it after ``make train``, with files of their own."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(trained, folder / "runs" / "default")
    shutil.copytree(ROOT / "configs", folder / "configs")
    rows = corpus_rows()
    # The README asks for a text and a label alone; agreement needs annotators.
    needed = ("text", "speaker", "dialogue", "conflict", "sentiment", "annotators")
    write_jsonl(folder / "my_annotations.jsonl", [{k: row[k] for k in needed} for row in rows])
    write_jsonl(folder / "held_out.jsonl", corpus_rows(40, seed=1))
    quotes = [{"speaker": r["speaker"], "text": r["text"], "source": "wire"} for r in rows[:20]]
    write_jsonl(folder / "quotes.jsonl", quotes)
    lines = ["speaker,text,source", *(f'{q["speaker"]},"{q["text"]}",wire' for q in quotes)]
    (folder / "quotes.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.slow
def test_the_readmes_commands_run(workplace, tiny_encoder):
    """Every command of a bash block, in order; training is shortened, nothing else is changed."""
    tiny = (
        f" --set model.encoder={shlex.quote(tiny_encoder)} --set training.num_train_epochs=1.0"
        " --set training.use_cpu=true --set data.max_length=48"
    )
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert len(commands) >= 5
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in commands:
        assert command.startswith("stance ")
        extra = tiny if command.startswith("stance train") else ""
        extra = " --no-tokens" if command.startswith("stance validate") else extra
        result = subprocess.run(
            command + extra, shell=True, cwd=workplace, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{command}\n{result.stderr}"
    labelled = [r.data for r in read_records(workplace / "labelled.csv")]
    assert len(labelled) == 20
    assert {"source", "stance", "lean", "dialogue", "dialogue_score"} <= set(labelled[0])
    assert "dialogue_favor" in json.loads((workplace / "labelled.jsonl").read_text().splitlines()[0])


@pytest.mark.slow
def test_the_readmes_python_runs(workplace):
    """All blocks, in order, as one session; the export of the README's command is there."""
    if not (workplace / "exports" / "dialogue").exists():
        export(
            workplace / "runs/default", workplace / "exports/dialogue", format="transformers", task="dialogue"
        )
    code = "\n".join(blocks("python"))
    result = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    *_, mapped, piped = result.stdout.splitlines()
    assert len(result.stdout.splitlines()) == 4
    assert mapped in STANCES
    assert any(f"'{label}'" in piped for label in DIALOGUE.labels)


def test_the_readmes_row_is_an_annotation():
    from stance.annotations import parse_statement
    from stance.labels import DEFAULT_TASKS
    from stance.records import Record

    (row,) = blocks("json")
    statement, problems = parse_statement(Record("README", 1, json.loads(row)), DEFAULT_TASKS)
    assert problems == []
    assert set(statement.labels) == {"dialogue", "conflict", "sentiment"}


def test_local_links_lead_somewhere():
    for path in [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "data/annotations").glob("*.md"),
    ]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_make_knows_the_readmes_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^\$ make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
