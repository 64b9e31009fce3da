"""The command line: what it prints where, its exit codes, and files in every format through it."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only get in each other's way in tiny models

import pyarrow
import pyarrow.parquet
import pytest

from conftest import corpus_rows, write_jsonl
from stance import __version__
from stance.cli import main
from stance.records import read_records

ADDED = [
    "stance", "stance_score", "lean", "dialogue", "dialogue_score", "conflict", "conflict_score",
    "sentiment", "sentiment_score",
]  # fmt: skip
HEAVY = ("torch", "transformers", "datasets", "sklearn", "pandas", "pyarrow", "numpy", "scipy")


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def stance(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in this process; whatever it says must be no traceback."""

    def call(*arguments: Any, stdin: str | bytes | None = None) -> Result:
        if stdin is not None:
            data = stdin.encode() if isinstance(stdin, str) else stdin
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Result(int(left.value.code or 0), out, err)

    return call


def shell(command: str, **variables: Any) -> Result:
    """Run a line of bash in which ``stance`` is this environment's command."""
    folder = str(Path(sys.executable).parent)
    env = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        **{k: str(v) for k, v in variables.items()},
    }
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=env)
    return Result(done.returncode, done.stdout, done.stderr)


STATEMENTS = [
    {"text": "We will meet, again.", "speaker": "the envoy", "note": "first, with a comma"},
    {"text": 'He said "stop the war"', "speaker": "", "note": "wörld 🌍"},
    {"text": "two\nlines of a report", "speaker": "General North", "note": "NA"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows with other tools than the ones under test."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as handle:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(handle, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write_jsonl(path, rows)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8", newline="") as handle:
            return list(csv.DictReader(handle, delimiter="\t" if path.suffix == ".tsv" else ","))
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return parse(path.read_text(encoding="utf-8"))


def parse(lines: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.splitlines()]


# --- help, version, start ------------------------------------------------------------------------


def test_version(stance):
    assert stance("--version") == (0, f"stance {__version__}\n", "")


@pytest.mark.parametrize(
    "command",
    ["", "train", "validate", "agreement", "evaluate", "compare", "crossval", "audit", "predict"],
)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_data_and_names_the_exit_codes(stance, command, flag):
    result = stance(*filter(None, [command, flag]))
    assert result.code == 0
    assert result.err == ""
    assert result.out.startswith("Usage: ")
    assert command in result.out.splitlines()[0]
    assert "Exit codes: 0 ok" in result.out


@pytest.mark.parametrize(
    "code",
    [
        "import stance",
        "import stance; stance.StanceError; dir(stance)",
        "from stance.cli import main; main(['--help'])",
        "from stance.cli import main; main(['train', '--help'])",
        "from stance.cli import main; main(['--version'])",
    ],
)
def test_no_heavy_library_is_loaded_before_it_is_needed(code):
    probe = f"import atexit, sys\natexit.register(lambda: print(*sys.modules, file=sys.stderr))\n{code}"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.split())
    assert "stance" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_python_m_stance_is_the_same_command():
    assert (
        shell("python -m stance --version") == shell("stance --version") == (0, f"stance {__version__}\n", "")
    )


# --- exit codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-command"], "No such command 'no-such-command'"),
        (["train"], "Missing argument 'CONFIG'"),
        (["train", "x.yaml", "--no-such-option"], "No such option: --no-such-option"),
        (["train", "x.yaml", "--seeds", "0"], "Invalid value for '--seeds'"),
        (["train", "no-such.yaml"], "no such config file"),
        (["train", "x.yaml", "--resume", "--force"], "--resume and --force exclude each other"),
        (["validate", "no-such.jsonl"], "no such file or folder"),
        (["validate", "{corpus}", "--set", "a=b"], "--set needs --config"),
        (["agreement", "no-such.jsonl"], "no such file or folder"),
        (["evaluate", "{trained}", "no-such.jsonl"], "no such file or folder"),
        (["predict", "{trained}", "no-such.csv"], "no such file or folder"),
        (["predict", "{trained}", "{corpus}", "-o", "x.xls"], "the suffix must be one of"),
        (["predict", "{trained}", "{corpus}", "-o", "{tmp}/x.txt"], "plain text cannot hold predictions"),
        (["predict", "{trained}", "{trained}/config.yaml"], "the suffix must be one of"),
        (["predict", "{trained}", "-", "--input-format", "xls"], "--input-format: must be one of"),
        (["predict", "{trained}", "{corpus}", "--batch-size", "0"], "Invalid value for '--batch-size'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_wrong_call_leaves_with_2(stance, trained, corpus, tmp_path, arguments, message):
    places = {"trained": trained, "corpus": corpus, "tmp": tmp_path}
    result = stance(*(a.format(**places) for a in arguments))
    assert result.code == 2
    assert result.out == ""
    assert message in result.err


def test_no_arguments_show_the_help(stance):
    result = stance()
    assert result.code == 2
    assert "Usage:" in result.out + result.err


def test_a_wrong_config_names_every_problem(stance, make_config):
    path = make_config(training={"learning_rat": 0.1, "seed": "x"}, model={"pooling": "max"})
    result = stance("train", path)
    assert result.code == 2
    assert result.out == ""
    assert "training.learning_rat: unknown key; did you mean 'learning_rate'?" in result.err
    assert "training.seed" in result.err
    assert "model.pooling" in result.err


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_missing_or_damaged_model_leaves_with_1(stance, trained, corpus, tmp_path, command):
    result = stance(command, tmp_path / "no-model", corpus)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"stance: {tmp_path}/no-model: no such model folder")
    broken = shutil.copytree(trained, tmp_path / "broken")
    (broken / "stance.json").write_text("{}")
    result = stance(command, broken, corpus)
    assert (result.code, result.out) == (1, "")
    assert "stance.json has changed" in result.err


def test_a_missing_encoder_leaves_with_1(stance, make_config, tmp_path):
    result = stance("train", make_config(model={"encoder": str(tmp_path / "no-encoder")}))
    assert (result.code, result.out) == (1, "")
    assert "model.encoder" in result.err


def test_bad_training_rows_leave_with_3(stance, make_config, corpus):
    with corpus.open("a") as handle:
        handle.write('{"text": "war", "dialogue": "favour"}\n{"txt": "war"}\nnot json\n')
    result = stance("train", make_config())
    assert (result.code, result.out) == (3, "")
    assert "corpus.jsonl:123: not valid JSON" in result.err


# --- train, evaluate, predict --------------------------------------------------------------------


def test_train_evaluate_predict(stance, make_config, corpus, tmp_path):
    result = stance("train", make_config(), "--set", "training.num_train_epochs=1.0", "-o", tmp_path / "own")
    assert result.code == 0
    assert not (tmp_path / "run").exists()
    lines = result.out.splitlines()
    assert lines[1] == "test split, 12 statements"
    assert lines[3].split()[-6:] == ["F1", "majority", "F1", "tfidf_lr", "F1", "embeddings_lr"]
    assert [line.split()[0] for line in lines[4:8]] == ["stance", "dialogue", "conflict", "sentiment"]
    assert lines[-1] == f"model: {tmp_path / 'own'}"
    assert "training on 96 statements, validating on 12, testing on 12; cpu, fp32" in result.err

    report = json.loads((tmp_path / "own" / "report" / "report.json").read_text())
    assert report["n"] == 12
    again = stance("train", make_config(), "--set", "training.num_train_epochs=1.0",
                   "-o", tmp_path / "own", "--resume")  # fmt: skip
    assert (again.code, again.out) == (0, result.out)  # the same report, not trained anew
    assert "finished already" in again.err

    scored = stance("evaluate", tmp_path / "own", corpus, "--format", "json", "-o", tmp_path / "report")
    scores = json.loads(scored.out)
    assert scores["n"] == 120
    assert scores == json.loads((tmp_path / "report" / "report.json").read_text())
    assert len(parse((tmp_path / "report" / "predictions.jsonl").read_text())) == 120
    shown = stance("evaluate", tmp_path / "own", corpus)
    assert f"{scores['scores']['stance']['macro_f1']:.3f}" in shown.out

    unlabelled = write(tmp_path / "in.jsonl", [{"text": r["text"]} for r in corpus_rows(5)])
    predicted = stance("predict", tmp_path / "own", unlabelled)
    assert predicted.code == 0
    assert [r["text"] for r in parse(predicted.out)] == [r["text"] for r in corpus_rows(5)]


def test_resume_makes_what_a_kill_left_out_of_the_report(stance, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    resume = ("train", run / "config.yaml", "-o", run, "--resume", "--no-baselines")
    first = stance(*resume)
    assert first.code == 0
    stored, page, card = run / "report/report.json", run / "report/report.html", run / "README.md"
    before = (stored.read_text(), page.read_text(), card.read_text())
    page.unlink()  # killed between the figures and the page
    card.unlink()
    again = stance(*resume)
    assert (again.code, again.out) == (0, first.out)
    assert (stored.read_text(), page.read_text(), card.read_text()) == before
    card.write_text("a card of my own")
    assert stance(*resume).code == 0
    assert card.read_text() == "a card of my own"


@pytest.mark.parametrize("spoil", ["evaluate", "damage", "other weights", "no predictions"])
def test_resume_takes_no_other_report_for_its_own(stance, trained, tmp_path, spoil):
    run = shutil.copytree(trained, tmp_path / "run")
    resume = ("train", run / "config.yaml", "-o", run, "--resume", "--no-baselines")
    first, stored = stance(*resume), run / "report/report.json"
    report = json.loads(stored.read_text())
    if spoil == "evaluate":
        data = write(tmp_path / "rows.jsonl", corpus_rows(12, seed=5))
        assert stance("evaluate", run, data, "-o", run / "report", "--force", "--no-ablation").code == 0
        assert "examples" not in json.loads(stored.read_text())
    elif spoil == "damage":
        stored.write_text("{")
    elif spoil == "other weights":
        stored.write_text(json.dumps(report | {"n": 7, "model": report["model"] | {"sha256": "0" * 64}}))
    else:
        (run / "report/predictions.jsonl").unlink()
    again = stance(*resume)
    assert (again.code, again.out) == (0, first.out)
    assert json.loads(stored.read_text()) == report | {"created": json.loads(stored.read_text())["created"]}
    assert (run / "report/predictions.jsonl").is_file()


def test_evaluate_on_the_rows_of_one_split(stance, trained, tmp_path):
    rows = corpus_rows(20)
    for i, row in enumerate(rows):
        row["part"] = "test" if i < 5 else "train"
    data = write(tmp_path / "rows.jsonl", rows)
    arguments = ("evaluate", trained, data, "--split-column", "part", "--format", "json")
    assert json.loads(stance(*arguments, "--split", "test").out)["n"] == 5
    result = stance(*arguments, "--split", "dev")
    assert result.code == 3
    assert "part: no row says 'dev'" in result.err


def test_evaluate_does_not_replace_a_report_unasked(stance, trained, corpus, tmp_path):
    folder = tmp_path / "report"
    arguments = ("evaluate", trained, corpus, "-o", folder)
    assert stance(*arguments).code == 0
    (folder / "report.json").write_text("mine")
    result = stance(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "--force" in result.err
    assert (folder / "report.json").read_text() == "mine"
    assert stance(*arguments, "--force").code == 0
    assert json.loads((folder / "report.json").read_text())["n"] == 120


def test_evaluate_needs_labels(stance, trained, tmp_path):
    data = write(tmp_path / "rows.jsonl", [{"text": "war"}])
    result = stance("evaluate", trained, data)
    assert (result.code, result.out) == (3, "")
    assert "no row has a label" in result.err


# --- predict: formats ----------------------------------------------------------------------------

SUFFIXES = [".csv", ".tsv", ".jsonl", ".parquet"]


@pytest.mark.parametrize("into", SUFFIXES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_into_every_format(stance, trained, tmp_path, suffix, into):
    source, target = write(tmp_path / f"in{suffix}", STATEMENTS), tmp_path / "new" / f"out{into}"
    result = stance("predict", trained, source, "-o", target)
    assert (result.code, result.out) == (0, "")
    assert "3 statements labelled" in result.err
    rows = read(target)
    assert [{k: r[k] for k in STATEMENTS[0]} for r in rows] == STATEMENTS
    assert all(list(r) == [*STATEMENTS[0], *ADDED] for r in rows)
    assert {r["stance"] for r in rows} <= {"dialogue", "conflict", "mixed", "neutral"}
    assert all(0 < float(r["stance_score"]) <= 1 and -1 <= float(r["lean"]) <= 1 for r in rows)
    # nothing half-written is left
    assert {p.name for p in target.parent.iterdir()} == {target.name, f"{target.name}.meta.json"}


def test_files_and_stdin_and_python_agree(stance, trained, tmp_path):
    from stance import load

    expected = [p.labels for p in load(trained).predict(STATEMENTS)]
    source = write(tmp_path / "in.csv", STATEMENTS)
    by_file = stance("predict", trained, source)
    by_lines = stance("predict", trained, "-", stdin="".join(json.dumps(s) + "\n" for s in STATEMENTS))
    by_csv = stance("predict", trained, "-", "--input-format", "csv", stdin=source.read_bytes())
    assert by_file.out == by_lines.out == by_csv.out
    assert [{t: r[t] for t in expected[0]} for r in parse(by_file.out)] == expected


@pytest.mark.slow
def test_a_pipe_in_and_out(trained):
    """The output of one is the input of the next, and standard error holds the count alone."""
    lines = r"""printf '{"text": "we will meet"}\n{"text": "stop the war"}\n'"""
    again = 'stance predict "$M" - --prefix second_'
    result = shell(f'{lines} | stance predict "$M" - 2>/dev/null | {again}', M=trained)
    assert result.code == 0
    assert [r["text"] for r in parse(result.out)] == ["we will meet", "stop the war"]
    assert re.fullmatch(r"2 statements labelled \(.*\)\n", result.err)


def test_plain_text_is_one_statement_a_line(stance, trained, tmp_path):
    (tmp_path / "in.txt").write_bytes("\ufeffwe will meet\r\n\r\n  stop the war \nlast".encode())
    rows = parse(stance("predict", trained, tmp_path / "in.txt").out)
    assert [r["text"] for r in rows] == ["we will meet", "  stop the war ", "last"]
    by_stdin = stance("predict", trained, "-", "--input-format", "text", stdin="we will meet\n")
    assert [r["text"] for r in parse(by_stdin.out)] == ["we will meet"]


def test_columns_by_other_names(stance, trained, tmp_path):
    rows = [{"Zitat": "we refused talks", "wer": "the envoy", "vorher": "asked", "text": 7}]
    source = write(tmp_path / "in.jsonl", rows)
    names = ("--text-column", "Zitat", "--speaker-column", "wer", "--context-column", "vorher")
    result = parse(stance("predict", trained, source, *names).out)[0]
    plain = [{"text": "we refused talks", "speaker": "the envoy", "context": "asked"}]
    expected = parse(stance("predict", trained, write(tmp_path / "plain.jsonl", plain)).out)[0]
    assert [result[k] for k in ADDED] == [expected[k] for k in ADDED]
    assert result["text"] == 7


def test_probabilities_of_every_label(stance, trained, tmp_path):
    source = write(tmp_path / "in.jsonl", STATEMENTS)
    for row in parse(stance("predict", trained, source, "--probabilities").out):
        for task, labels in (
            ("dialogue", ("against", "none", "favor")),
            ("conflict", ("against", "none", "favor")),
            ("sentiment", ("negative", "neutral", "positive")),
            ("stance", ("conflict", "neutral", "mixed", "dialogue")),
        ):
            values = {label: row[f"{task}_{label}"] for label in labels}
            assert sum(values.values()) == pytest.approx(1, abs=1e-5)
            assert row[f"{task}_score"] == values[row[task]]


def test_the_batch_size_changes_no_label(stance, trained, corpus):
    def labels(*options: Any) -> list[Any]:
        rows = parse(stance("predict", trained, corpus, *options).out)
        return [(r["id"], r["stance"], r["sentiment"]) for r in rows]

    assert labels() == labels("--batch-size", 1) == labels("--batch-size", 7)


def many(number: int) -> list[dict[str, Any]]:
    return [{"text": f"war {i}", "id": i} for i in range(number)]


def test_order_is_kept_over_many_rows(stance, trained, tmp_path):
    rows = parse(stance("predict", trained, write(tmp_path / "in.jsonl", many(1500))).out)
    assert [r["id"] for r in rows] == list(range(1500))


@pytest.mark.parametrize("into", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("late", [1, 1100])
def test_a_column_that_comes_late_is_kept(stance, trained, tmp_path, into, late):
    rows = many(1200)
    rows[late]["late"] = "here"
    target = tmp_path / f"out{into}"
    result = stance("predict", trained, write(tmp_path / "in.jsonl", rows), "-o", target)
    if result.code != 0:  # refusing is right too; losing it in silence is not
        assert "late" in result.err
        assert not target.exists()
        return
    assert read(target)[late]["late"] == "here"


def test_an_annotation_in_the_input_is_not_lost(stance, trained, tmp_path):
    """``predict`` on annotated rows must not put its own labels in the annotators' place in silence."""
    source = write(tmp_path / "in.jsonl", [{"text": "war", "dialogue": "my own", "lean": "my lean"}])
    result = stance("predict", trained, source)
    if result.code == 0:
        assert {"my own", "my lean"} <= {v for v in parse(result.out)[0].values() if isinstance(v, str)}
    else:
        assert result.code in (2, 3)
        assert "dialogue" in result.err


DAY = datetime.datetime(2024, 3, 1, 12, 30, tzinfo=datetime.UTC)


@pytest.mark.parametrize("into", ["-", ".jsonl", ".csv", ".parquet"])
def test_dates_of_a_parquet_file_are_kept(stance, trained, tmp_path, into):
    source = write(tmp_path / "in.parquet", [{"text": "war", "day": DAY, "date": DAY.date(), "raw": b"x"}])
    target = tmp_path / f"out{into}"
    result = stance("predict", trained, source, "-o", into if into == "-" else target)
    assert result.code == 0
    row = parse(result.out)[0] if into == "-" else read(target)[0]
    assert str(row["day"])[:10] == "2024-03-01"
    assert str(row["date"]) == "2024-03-01"


def test_columns_of_mixed_kinds_are_refused_or_kept_in_parquet(stance, trained, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"text": "war", "n": 1}, {"text": "peace", "n": "one"}])
    result = stance("predict", trained, source, "-o", tmp_path / "out.parquet")
    if result.code == 0:
        assert [str(r["n"]) for r in read(tmp_path / "out.parquet")] == ["1", "one"]
    else:
        assert result.code == 3
        assert not (tmp_path / "out.parquet").exists()


def test_lists_and_mappings_are_json_in_csv(stance, trained, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"text": "war", "codes": {"a1": ["x", "ü"]}}])
    assert stance("predict", trained, source, "-o", tmp_path / "out.csv").code == 0
    assert json.loads(read(tmp_path / "out.csv")[0]["codes"]) == {"a1": ["x", "ü"]}


# --- predict: what exists, what fails ------------------------------------------------------------


def test_an_existing_output_is_kept_unless_forced(stance, trained, tmp_path):
    source, target = write(tmp_path / "in.csv", STATEMENTS), tmp_path / "out.csv"
    target.write_text("mine")
    result = stance("predict", trained, source, "-o", target)
    assert (result.code, result.out) == (2, "")
    assert "exists already - replace it with --force" in result.err
    assert target.read_text() == "mine"
    assert stance("predict", trained, source, "-o", target, "--force").code == 0
    assert len(read(target)) == 3


def test_the_input_is_kept_even_if_forced(stance, trained, tmp_path):
    source = write(tmp_path / "in.csv", STATEMENTS)
    before = source.read_bytes()
    result = stance("predict", trained, source, "-o", source, "--force")
    assert result.code == 2
    assert "is the input, which would be lost" in result.err
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl", '{"text": "war"}\n{"text": ""}\n', "in.jsonl:2: text must be text that is not empty"),
        ("in.jsonl", '{"text": "war"}\n\n{"text": 7}\n', "in.jsonl:3: text must be text"),
        ("in.jsonl", '{"text": "war"}\n{"txt": "war"}\n', "in.jsonl:2: column 'text' is missing; got txt"),
        ("in.jsonl", '{"text": "war", "speaker": 3}\n', "in.jsonl:1: speaker must be text; got 3"),
        ("in.jsonl", '{"text": "war"}\n{"text": "war"\n', "in.jsonl:2: not valid JSON"),
        ("in.jsonl", '{"text": "war"}\n["war"]\n', "in.jsonl:2: a line must hold a JSON object; got list"),
        ("in.jsonl", '{"text": "war"}\n{"text": "\\ud83d war"}\n', "in.jsonl:2: "),
        ("in.jsonl", b'{"text": "war"}\n{"text": "\xff"}\n', "not UTF-8"),
        ("in.csv", "text,note\nwar,a\nwar\n", "in.csv:3: the row must have 2 cells like the header; got 1"),
        ("in.csv", 'text,note\nwar,a\n"war,b\n', "in.csv:3: not valid CSV"),
        ("in.csv", "quote,note\nwar,a\n", "in.csv:2: column 'text' is missing; got quote, note"),
        ("in.csv", "text,text\nwar,a\n", "in.csv:1: columns stand twice"),
        ("in.csv", "text\nwar\n \n", "in.csv:3: text must be text that is not empty"),
        ("in.parquet", "PAR1 no", "not a Parquet file"),
        ("in.jsonl", "", "no rows"),
        ("in.csv", "text\n", "no rows"),
        ("in.txt", "\n \n", "no rows"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("to_file", [False, True])
def test_bad_rows_leave_with_3_and_no_output(stance, trained, tmp_path, name, content, message, to_file):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    target = tmp_path / "out.jsonl"
    result = stance("predict", trained, tmp_path / name, *(["-o", target] if to_file else []))
    assert (result.code, result.out) == (3, "")
    assert result.err.startswith("stance: ")
    assert message in result.err
    assert {p.name for p in tmp_path.iterdir()} == {name}


def test_half_a_character_in_another_column_is_kept_or_refused(stance, trained, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "war", "note": "\\ud83d"}\n')
    result = stance("predict", trained, tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl")
    if result.code == 0:
        assert read(tmp_path / "out.jsonl")[0]["note"] == "\ud83d"
    else:
        assert result.code == 3
        assert "in.jsonl:1: " in result.err


def test_a_bad_row_far_down_leaves_no_file(stance, trained, tmp_path):
    rows = [*many(1100), {"text": ""}]
    result = stance("predict", trained, write(tmp_path / "in.jsonl", rows), "-o", tmp_path / "out.csv")
    assert result.code == 3
    assert "in.jsonl:1101: " in result.err
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl"}


def test_bad_rows_of_standard_input_are_named(stance, trained):
    result = stance("predict", trained, "-", stdin='{"text": "war"}\n{"text": null}\n')
    assert (result.code, result.out) == (3, "")
    assert "-:2: text must be text" in result.err


def test_rows_that_standard_output_lacks_are_told_even_quietly(stance, trained):
    lines = '{"text": "war"}\n{"text": null}\n'
    result = stance("predict", trained, "-", "-q", "--on-error", "skip", stdin=lines)
    assert (result.code, len(parse(result.out))) == (0, 1)
    first, last = result.err.splitlines()
    assert first.startswith("-:2: text must be text")
    assert last.startswith("1 statements labelled, 1 rows rejected")
    assert stance("predict", trained, "-", "-q", stdin='{"text": "war"}\n').err == ""


def test_standard_output_is_utf8_in_any_locale(stance, trained, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", newline="\r\n"))
    assert stance("predict", trained, "-", "-q", stdin='{"text": "wörld 🌍"}\n').code == 0
    (line,) = raw.getvalue().splitlines(keepends=True)
    assert json.loads(line.decode())["text"] == "wörld 🌍"
    assert not line.endswith(b"\r\n")


def test_a_folder_of_several_files_is_not_half_read(stance, trained, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write(folder / name, [{"text": "war", "note": name}])
    result = stance("predict", trained, folder)
    assert result.code == 2 or [r["note"] for r in parse(result.out)] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("where", ["file/out.csv", "folder.csv"])
def test_an_output_that_cannot_be_written_is_named(stance, trained, tmp_path, where):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.csv").mkdir()
    source = write(tmp_path / "in.csv", STATEMENTS)
    result = stance("predict", trained, source, "-o", tmp_path / where, "--force")
    assert result.code in (1, 2)
    assert where in result.err


def test_a_report_that_cannot_be_written_is_named(stance, trained, corpus, tmp_path):
    (tmp_path / "file").write_text("")
    result = stance("evaluate", trained, corpus, "-o", tmp_path / "file" / "report")
    assert result.code in (1, 2)
    assert "report" in result.err


@pytest.mark.slow
def test_a_full_standard_output_is_no_success(trained, corpus):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    result = shell('stance predict "$M" "$F" --prefix p_ > /dev/full', M=trained, F=corpus)
    assert result.code == 1
    assert "No space left" in result.err
    assert "Traceback" not in result.err


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error(trained, tmp_path):
    source = write(tmp_path / "in.jsonl", many(3000))
    result = shell('set -o pipefail; stance predict "$M" "$F" | head -1', M=trained, F=source)
    assert (result.code, len(result.out.splitlines())) == (0, 1)
    assert "Traceback" not in result.err
    assert "Broken" not in result.err
    assert "Exception" not in result.err


# --- validate and agreement ----------------------------------------------------------------------


def test_validate_says_that_all_is_well(stance, corpus):
    result = stance("validate", corpus, "--no-tokens")
    assert result.code == 0
    assert result.out.startswith("120 usable rows\n")
    assert result.out.splitlines()[-1].startswith("0 errors, ")


def test_validate_names_every_error_and_leaves_with_3(stance, tmp_path):
    rows = [
        {"id": "a", "text": "we will meet", "dialogue": "favor"},
        {"id": "a", "text": "stop the war", "dialogue": "favour"},
        {"id": "a", "text": "the river report", "conflict": "none"},
        {"id": "b", "text": ""},
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    result = stance("validate", data, "--no-tokens", "--format", "json")
    assert result.code == 3
    assert "3 errors in 1 files" in result.err
    report = json.loads(result.out)
    assert report["rows"] == 2
    assert report["summary"]["error"] == 3
    errors = {(f["where"], f["code"]) for f in report["findings"] if f["level"] == "error"}
    assert errors == {(f"{data}:2", "row"), (f"{data}:3", "id"), (f"{data}:4", "row")}
    text = stance("validate", data, "--no-tokens")
    assert text.code == 3
    assert f"error [row] {data}:2: dialogue must be one of against, none, favor; got 'favour'" in text.out
    assert "3 errors, " in text.out.splitlines()[-1]


@pytest.mark.parametrize(
    "content", ["", "\n", '{"text": ""}\n', "not json\n", '{"text": "?!"}\n', '{"text": "war \\ud83d"}\n']
)
def test_validate_survives_files_without_a_usable_row(stance, tmp_path, content):
    (tmp_path / "rows.jsonl").write_text(content)
    for form in ("text", "json"):
        result = stance("validate", tmp_path / "rows.jsonl", "--no-tokens", "--format", form)
        assert result.code in (0, 3)
        assert "rows" in result.out


def test_validate_counts_tokens_with_the_configs_encoder(stance, make_config, corpus, tmp_path):
    rows = corpus_rows(30)
    rows[3]["text"] += " war" * 60
    data = write(tmp_path / "long.jsonl", rows)
    path = make_config()
    result = stance("validate", data, "--config", path, "--format", "json")
    found = [f for f in json.loads(result.out)["findings"] if f["code"] == "long"]
    assert [f["where"] for f in found] == [f"{data}:4"]
    assert "more than the model's 48" in found[0]["message"]
    longer = stance("validate", data, "--config", path, "--set", "data.max_length=100", "--format", "json")
    assert not [f for f in json.loads(longer.out)["findings"] if f["code"] == "long"]


def annotated(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "text": f"war {i}",
            "speaker": "the envoy",
            "annotators": {"a1": {"dialogue": a}, "a2": {"dialogue": b}},
        }
        for i, (a, b) in enumerate(pairs)
    ]


def test_agreement(stance, tmp_path):
    rows = annotated(("favor", "favor"), ("none", "none"), ("against", "none"), ("favor", "favor"))
    data = write(tmp_path / "rows.jsonl", rows)
    report = json.loads(stance("agreement", data, "--format", "json").out)
    assert report["n"] == 4
    assert report["tasks"]["dialogue"]["raw"] == 0.75
    assert report["tasks"]["dialogue"]["kappa"] == pytest.approx(0.6)
    assert report["tasks"]["conflict"]["alpha"] is None
    text = stance("agreement", data)
    assert text.code == 0
    assert "4 rows with two or more annotators" in text.out
    assert "raw 0.750 (n 4)" in text.out
    assert "rows.jsonl" not in text.out
    listed = stance("agreement", data, "--list")
    assert f"{data}:3: dialogue: a1 against, a2 none | the envoy: war 2" in listed.out


def test_agreement_needs_two_annotators(stance, tmp_path):
    data = write(tmp_path / "rows.jsonl", [{"text": "war", "annotators": {"a1": {"dialogue": "none"}}}])
    result = stance("agreement", data)
    assert (result.code, result.out) == (2, "")
    assert "codes of two annotators" in result.err


@pytest.mark.parametrize(
    "annotators", ["a1, a2", ["a1", "a2"], 7, {"a1": "favor", "a2": "none"},
                   {"a1": {"dialogue": "favour"}, "a2": {"dialogue": "none"}}, {"a1": {"dialogue": 3}, "a2": {}},
                   {"a1": {"dialogue": []}, "a2": {"dialogue": {}}},
                   {"a1": {"dialogue": "for", "conflict": "none"}, "a2": {}}],
    ids=json.dumps,
)  # fmt: skip
def test_agreement_on_malformed_codes_names_the_row(stance, tmp_path, annotators):
    good = annotated(("favor", "favor"), ("none", "against"))
    data = write(tmp_path / "rows.jsonl", [*good, {"text": "war", "annotators": annotators}])
    result = stance("agreement", data)
    assert (result.code, result.out) == (3, "")
    assert f"{data}:3: annotators" in result.err


def test_predictions_can_be_read_again(stance, trained, corpus, tmp_path):
    """The output of predict is input for evaluate: the model agrees with itself."""
    source = write(
        tmp_path / "in.jsonl", [{"text": r["text"], "speaker": r["speaker"]} for r in corpus_rows(30)]
    )
    target = tmp_path / "out.csv"
    assert stance("predict", trained, source, "-o", target).code == 0
    assert len(list(read_records(target))) == 30
    scores = json.loads(stance("evaluate", trained, target, "--format", "json").out)["scores"]
    assert all(entry["accuracy"] == 1 for entry in scores.values())
