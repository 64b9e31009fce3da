"""The commands that faults.py strikes, on tiny models, and what must be true of their outputs at any moment."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from faulty import processes

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from conftest import build_encoder, corpus_rows, write_jsonl

__all__ = ["Job", "Lost", "Place", "make_jobs", "tree"]

View = dict[str, bytes] | None
"""What a reader of an output gets: its files, or None where there is none."""


class Lost(Exception):
    """Something that should have survived did not."""


@dataclass(frozen=True)
class Place:
    """Where the campaign works: ``inputs`` are read, ``disk`` holds outputs alone."""

    root: Path

    @property
    def inputs(self) -> Path:
        return self.root / "inputs"

    @property
    def disk(self) -> Path:
        return self.root / "disk"


@dataclass
class Job:
    """A command with what it must leave.

    Attributes:
        kind: training, prediction or export.
        name: which of its kind.
        start: the arguments of ``stance``.
        again: those to go on with after an interruption.
        anew: those to begin over where ``again`` is refused (exit code 2), if there are any.
        view: what a reader gets of the output; raises ``Lost`` where that is neither whole nor nothing.
        progress: how far the work is that will not be done again.
        stage: what the disk looks like, in a word, for the record.
        old: a folder of an earlier result, put there before the command starts.
        gap: whether, with an earlier result, there may be none for a while.
    """

    kind: str
    name: str
    start: list[str]
    again: list[str]
    view: Callable[[], View]
    progress: Callable[[], int]
    stage: Callable[[], str]
    anew: list[str] | None = None
    old: Path | None = None
    gap: bool = False
    # Found by :meth:`learn`.
    expected: dict[str, bytes] = field(default_factory=dict)
    before: View = None
    after: View = None
    seconds: float = 0.0
    operations: list[str] = field(default_factory=list)

    def prepare(self, disk: Path) -> None:
        """Empty the disk but for the earlier result."""
        for path in disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.old is not None:
            shutil.copytree(self.old, disk, dirs_exist_ok=True)

    def learn(self, disk: Path) -> None:
        """Run it undisturbed, twice, and keep what it leaves and how long it takes."""
        for _ in range(2):  # the first time more is loaded
            self.prepare(disk)
            self.before = self.view()
            ended = processes.run(self.start, disk)
            if ended.code != 0:
                raise SystemExit(f"{self.kind} {self.name}: failed undisturbed: {ended.message}")
            known, self.expected = self.expected, tree(disk)
        if known != self.expected:
            raise SystemExit(
                f"{self.kind} {self.name}: two undisturbed runs differ: {differing(known, tree(disk))}"
            )
        self.after, self.seconds, self.operations = self.view(), ended.seconds, ended.operations

    def check(self) -> None:
        """See that the old state or the new one is there, whole.

        Raises:
            Lost: it is not.
        """
        found = self.view()
        if found not in (self.before, self.after) and not (self.gap and found is None):
            raise Lost("the output is neither the old one nor the new one")

    def compare(self, disk: Path) -> None:
        """See that the disk holds what an undisturbed run leaves, and nothing else.

        Raises:
            Lost: it does not.
        """
        found = tree(disk)
        if found != self.expected:
            raise Lost(f"differs from the undisturbed run in {differing(found, self.expected)}")


def differing(one: dict[str, bytes], two: dict[str, bytes]) -> str:
    """Name the files that differ, with the first place where they do."""
    told = []
    for name in sorted({*one, *two}):
        a, b = one.get(name), two.get(name)
        if a is None or b is None:
            told.append(f"{name} ({'lacks' if a is None else 'is too much'})")
        elif a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            told.append(f"{name} ({a[max(0, at - 60) : at + 60]!r} / {b[max(0, at - 60) : at + 60]!r})")
    return ", ".join(told)


_TIMED = ("run.json", "metrics.json", "report/report.json", "report/report.html", "README.md")
_TIMES = {
    "command", "created", "runtime", "samples_per_second", "seconds", "sessions", "started", "steps_per_second", "timings",
}  # fmt: skip
"""What differs between two undisturbed runs, in JSON: times, speeds, and the command's own options."""
_TIME = re.compile(
    rb'\d{4}-\d\d-\d\d(T|, )\d\d:\d\d(:\d\dZ)?|<data value="[^"]*" data-path="/model/training/seconds"[^<]*'
    rb'|"(' + "|".join(sorted(_TIMES)).encode() + rb')": ?(-?[\d.]+|"[^"]*"|\[[^]]*\]|{[^}]*})'
)
"""And in pages, which hold the JSON too."""


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes, but for times of day and speeds; empty folders too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            found[f"{name}/"] = b""
            continue
        data = path.read_bytes()
        if name.partition("/")[2] in _TIMED:
            data = _without_times(data) if path.suffix == ".json" else _TIME.sub(b"", data)
        found[name] = data
    return found


def _without_times(data: bytes) -> bytes:
    def kept(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {k: v for k, v in pairs if k.removeprefix("eval_") not in _TIMES}

    try:
        return json.dumps(json.loads(data, object_pairs_hook=kept), sort_keys=True).encode()
    except ValueError:  # it should be whole, so it is compared as it is
        return data


# --- what is run ---------------------------------------------------------------------------------


def make_jobs(place: Place, kinds: Sequence[str], *, quick: bool) -> list[Job]:
    """Make inputs and jobs; quick: little input, and one job of each kind."""
    _write_inputs(place, 2500 if quick else 7000)
    jobs = []
    if "training" in kinds:
        jobs += _trainings(place)
    if "prediction" in kinds:
        jobs += _predictions(place)
    if "export" in kinds:
        jobs += _exports(place, graphs=not quick)
    return [next(job for job in jobs if job.kind == kind) for kind in kinds] if quick else jobs


def _write_inputs(place: Place, number: int) -> None:
    inputs = place.inputs
    inputs.mkdir(parents=True)
    place.disk.mkdir()
    _in_child(lambda: build_encoder(inputs / "encoder"))
    columns = ("id", "text", "speaker", "dialogue", "setting")  # few, so that the report is made in no time
    write_jsonl(inputs / "corpus.jsonl", [{name: row[name] for name in columns} for row in corpus_rows()])
    for name, seed in (("new", 42), ("old", 7)):
        tree_ = {
            "output_dir": str(inputs / f"run-{name}"),
            "data": {"files": [str(inputs / "corpus.jsonl")], "max_length": 48},
            "model": {"encoder": str(inputs / "encoder"), "freeze_embeddings": False},
            "tasks": [{"name": "dialogue", "labels": ["against", "none", "favor"]}],
            "training": {
                "num_train_epochs": 3.0, "save_steps": 4, "per_device_train_batch_size": 16,
                "learning_rate": 0.002, "use_cpu": True, "precision": "fp32", "seed": seed,
            },
        }  # fmt: skip
        (inputs / f"{name}.yaml").write_text(yaml.safe_dump(tree_), encoding="utf-8")
        _succeed(["train", str(inputs / f"{name}.yaml"), "--no-baselines"])
    rows = [{"id": i, "speaker": r["speaker"], "text": r["text"]} for i, r in enumerate(corpus_rows(number))]
    rows[100]["text"] = rows[2100]["text"] = ""  # to be rejected
    write_jsonl(inputs / "quotes.jsonl", rows)
    _in_child(lambda: _write_parquet(rows, inputs / "quotes.parquet"))


def _write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _in_child(work: Callable[[], Any]) -> None:
    """Do something in a forked process, so that this one starts no threads."""
    ended = processes.run(["--version"], Path("/nowhere"), before=work)
    if ended.code != 0:
        raise SystemExit(ended.message)


def _succeed(arguments: list[str]) -> None:
    ended = processes.run(arguments, Path("/nowhere"))
    if ended.code != 0:
        raise SystemExit(f"stance {' '.join(arguments)}\n{ended.message}")


def _verified(folder: Path) -> View:
    """What ``stance verify`` finds: a whole model, or none."""
    ended = processes.run(["verify", str(folder)], folder)
    if ended.code == 0:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return {name: (folder / name).read_bytes() for name in ("manifest.json", *files)}
    if ended.code == 1 and ("manifest.json is missing" in ended.message or "no such model" in ended.message):
        return None
    raise Lost(f"stance verify: {ended.last}")


def _trainings(place: Place) -> list[Job]:
    from stance.checkpoint import checkpoint_step, newest_verified

    run = place.disk / "run"
    command = ["train", str(place.inputs / "new.yaml"), "--no-baselines", "-o", str(run)]
    old = place.root / "old-training"
    shutil.copytree(place.inputs / "run-old", old / "run")

    def progress() -> int:
        newest, _ = newest_verified(run / "checkpoints")
        return checkpoint_step(newest) if newest else 0

    def stage() -> str:
        checkpoints = [*run.glob("checkpoints/checkpoint-*")]
        if any(not (path / "manifest.json").exists() for path in checkpoints):
            return "inside a save"
        if (run / ".model.partial").exists():
            return "while the model was written"
        if (run / "manifest.json").exists():
            return "with a whole model there"
        return "between saves" if checkpoints else "before the first save"

    common: dict[str, Any] = {
        "kind": "training", "again": [*command, "--resume"], "progress": progress, "stage": stage,
        "view": lambda: _verified(run),
    }  # fmt: skip
    force = [*command, "--force"]
    return [
        Job(name="new", start=command, **common),
        Job(name="over an old run", start=force, anew=force, old=old, gap=True, **common),
    ]


def _predictions(place: Place) -> list[Job]:
    old = place.root / "old-prediction"
    old.mkdir()
    _succeed(["predict", str(place.inputs / "run-old"), str(place.inputs / "quotes.jsonl"), "--exact",
              "--on-error", "skip", "-o", str(old / "out.csv")])  # fmt: skip
    return [
        _prediction(place, "quotes.jsonl", "out.csv"),
        _prediction(place, "quotes.jsonl", "out.jsonl.gz"),
        _prediction(place, "quotes.parquet", "out.parquet"),
        _prediction(place, "quotes.jsonl", "out.csv", old),
    ]


def _prediction(place: Place, source: str, target: str, old: Path | None = None) -> Job:
    output = place.disk / target
    work = place.disk / f".{target}.stance"
    command = ["predict", str(place.inputs / "run-new"), str(place.inputs / source), "--exact",
               "--on-error", "skip", "-o", str(output)]  # fmt: skip
    force = [*command, "--force"]

    # Over an earlier output its companions come a moment before it; else it comes last.
    beside = [] if old else [place.disk / f"{target}.{name}" for name in ("meta.json", "rejects.jsonl")]

    def view() -> View:
        return {p.name: p.read_bytes() for p in (output, *beside) if p.exists()} if output.exists() else None

    def progress() -> int:
        try:
            rows: int = json.loads((work / "state.json").read_text())["progress"]["rows"]
        except FileNotFoundError:
            return 0
        return rows

    def stage() -> str:
        if (work / "whole").exists():
            return "while the parts were joined"
        if progress():
            return "between parts"
        return "after the end" if output.exists() and old is None else "before the first part"

    return Job(
        kind="prediction", name=f"{target}{' over an old one' if old else ''}",
        start=force if old else command, again=[*command, "--resume"], anew=force if old else None,
        view=view, progress=progress, stage=stage, old=old,
    )  # fmt: skip


def _exports(place: Place, *, graphs: bool) -> list[Job]:
    old = place.root / "old-export"
    old.mkdir()
    _succeed(["export", str(place.inputs / "run-old"), "-o", str(old / "export"), "--format", "transformers"])
    stock = [_export(place, "transformers", old=old), _export(place, "transformers")]
    stock.append(_export(place, "transformers", "--task", "dialogue", old=old))
    if not graphs:
        return stock
    return [*stock, _export(place, "onnx"), _export(place, "openvino", old=old)]


def _export(place: Place, format: str, *options: str, old: Path | None = None) -> Job:
    output = place.disk / "export"
    command = ["export", str(place.inputs / "run-new"), "-o", str(output), "--format", format, *options]
    command += ["--force"] if old else []

    def stage() -> str:
        if any(place.disk.glob(".export*")):
            return "while it was made"
        return "with an export there, nothing beside" if output.exists() else "with nothing there"

    return Job(
        kind="export", name=" ".join([format, *options]) + (" over an old one" if old else ""),
        start=command, again=command, view=lambda: _verified(output), progress=lambda: 0, stage=stage, old=old,
    )  # fmt: skip
