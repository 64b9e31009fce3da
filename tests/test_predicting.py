"""Files labelled: nothing lost, nothing twice, the same bytes however a run was interrupted."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import corpus_rows, write_jsonl
from stance import Classifier, load, predicting
from stance import source as source_module
from stance.atomic import hold
from stance.errors import DataError, StanceError, UsageError
from stance.parts import WorkFolder
from stance.predicting import predict_files
from stance.records import read_records, unescape_formula
from stance.request import Options, check_call
from stance.source import Source

SMALL = {"part_rows": 16}


@pytest.fixture(scope="module")
def model(trained: Path) -> Classifier:
    return load(trained, device="cpu", exact=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """100 rows with types that text has not, some of them twice."""
    rows = [
        {"id": i, "speaker": r["speaker"], "text": r["text"], "codes": {"a": [i, None]}, "q": i / 7}
        for i, r in enumerate(corpus_rows(90, seed=5))
    ]
    return write_jsonl(tmp_path / "in.jsonl", rows + rows[:10])


def run(
    model: Classifier,
    source: Path | list[Path],
    output: Path,
    *,
    resume=False,
    force=False,
    log=None,
    **options,
):
    paths = [str(p) for p in (source if isinstance(source, list) else [source])]
    return predict_files(
        model, paths, str(output), Options(**{**SMALL, **options}), resume=resume, force=force,
        log=log or (lambda line: None),
    )  # fmt: skip


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [r.data for r in read_records(path)]


def beside(path: Path) -> set[str]:
    return {p.name for p in path.parent.iterdir()}


# --- any rows, any format ------------------------------------------------------------------------

characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
cells = st.text(characters, max_size=20)
tables = st.lists(
    st.fixed_dictionaries({"text": st.text(characters, min_size=1, max_size=60).filter(str.strip),
                           "speaker": cells, "note": cells}),
    min_size=1, max_size=12,
)  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".csv.gz", ".jsonl.zst"])
@settings(max_examples=12, deadline=None)
@given(rows=tables)
def test_any_rows_keep_order_and_columns_and_get_what_python_gives(model, suffix, rows):
    with tempfile.TemporaryDirectory() as name:
        given_, output = write_jsonl(Path(name, "in.jsonl"), rows), Path(name, f"out{suffix}")
        assert run(model, given_, output, part_rows=5, probabilities=True).labelled == len(rows)
        found = rows_of(output)
        back = unescape_formula if "sv" in suffix else str
        assert [{k: back(r[k]) for k in rows[0]} for r in found] == rows
        for row, prediction in zip(found, model.predict(rows), strict=True):
            for task, values in (
                *prediction.probabilities.items(),
                ("stance", prediction.stance_probabilities),
            ):
                shown = {label: float(row[f"{task}_{label}"]) for label in values}
                assert sum(shown.values()) == pytest.approx(1, abs=1e-5)
                assert shown == pytest.approx(values, abs=2e-6)
            assert float(row["lean"]) == pytest.approx(prediction.lean, abs=2e-6)
        assert beside(output) == {"in.jsonl", output.name, f"{output.name}.meta.json"}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("number", [1, 2, 3, 9])
def test_the_shards_are_the_whole(model, source, tmp_path, suffix, number):
    """Part by part and to the last digit, also where there are more shards than parts."""
    run(model, source, tmp_path / f"whole{suffix}")
    shards = []
    for i in range(1, number + 1):
        path = tmp_path / f"shard{i}{suffix}"
        run(model, source, path, shard=(i, number))
        shards.append(rows_of(path))
    dealt = [row for k in range(7) for row in shards[k % number][k // number * 16 : (k // number + 1) * 16]]
    assert dealt == rows_of(tmp_path / f"whole{suffix}")
    assert sum(map(len, shards)) == 100


@pytest.mark.parametrize("shard", [(0, 3), (4, 3), (1, 0)])
def test_a_shard_that_is_none_is_refused(shard):
    with pytest.raises(UsageError, match="--shard: must be i/n with i from 1 to n"):
        Options(shard=shard)


def test_parquet_keeps_its_types(model, tmp_path):
    table = pyarrow.table(
        {
            "text": pyarrow.array(["we will meet"] * 40).dictionary_encode(),
            "when": pyarrow.array(range(40), pyarrow.timestamp("us", "UTC")),
            "small": pyarrow.array(range(40), pyarrow.int8()),
            "nested": [{"a": [i], "b": None} for i in range(40)],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet", row_group_size=7)
    run(model, tmp_path / "in.parquet", tmp_path / "out.parquet")
    result = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    for name in ("when", "small", "nested"):
        assert result.column(name).combine_chunks().equals(table.column(name).combine_chunks()), name
        assert result.schema.field(name).type == table.schema.field(name).type
    note = json.loads(result.schema.metadata[b"stance"])
    assert note == json.loads((tmp_path / "out.parquet.meta.json").read_text())
    assert note["backend"] == "torch fp32 cpu"
    assert note["labelled"] == 40


def test_several_files_are_one_output(model, tmp_path):
    rows = corpus_rows(30)
    one = write_jsonl(tmp_path / "a.jsonl", rows[:20])
    with gzip.open(tmp_path / "b.csv.gz", "wt", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, ["speaker", "text", "id"])
        writer.writeheader()
        writer.writerows({k: r[k] for k in ("speaker", "text", "id")} for r in rows[20:])
    run(model, [one, tmp_path / "b.csv.gz"], tmp_path / "out.jsonl", prefix="p_")
    assert [r["id"] for r in rows_of(tmp_path / "out.jsonl")] == [r["id"] for r in rows]


def test_tables_of_other_columns_are_refused(model, tmp_path):
    (tmp_path / "a.csv").write_text("text,x\nwar,1\n")
    (tmp_path / "b.csv").write_text("x,text\n2,peace\n")
    (tmp_path / "c.csv").write_text("text,y\nwar,1\n")
    run(model, [tmp_path / "a.csv", tmp_path / "b.csv"], tmp_path / "out.csv")
    assert [(r["text"], r["x"]) for r in rows_of(tmp_path / "out.csv")] == [("war", "1"), ("peace", "2")]
    with pytest.raises(DataError, match=r"c\.csv: columns must be those of .*a\.csv: text, x; got text, y"):
        run(model, [tmp_path / "a.csv", tmp_path / "c.csv"], tmp_path / "no.csv")


@pytest.mark.parametrize("suffix", [".csv.gz", ".jsonl.zst"])
def test_a_damaged_archive_is_named(model, tmp_path, suffix):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": f"war {i} {'x' * (i % 70)}"} for i in range(500)])
    packed = tmp_path / f"packed{suffix}"
    run(model, source, packed)
    packed.write_bytes(packed.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"packed.*: the compressed file is damaged"):
        run(model, packed, tmp_path / "out.jsonl", prefix="p_")


def test_numbers_that_json_has_not_are_null(model, tmp_path):
    numbers = [1.5, float("nan"), float("inf")]
    nested = [{"a": [n]} for n in numbers]
    source = parquet(tmp_path / "in.parquet", {"text": ["war"] * 3, "n": numbers, "nested": nested})
    for suffix in (".jsonl", ".csv"):
        run(model, source, tmp_path / f"out{suffix}")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [(r["n"], r["nested"]) for r in rows] == [(1.5, {"a": [1.5]}), *[(None, {"a": [None]})] * 2]
    assert [r["nested"] for r in rows_of(tmp_path / "out.csv")] == ['{"a": [1.5]}', *['{"a": [null]}'] * 2]


def test_formula_cells_are_escaped_and_come_back(model, tmp_path):
    notes = ["=1+1", "+a", "-b", "@c", "\tx", "\r=", "'=quoted", "-5", "+1.5e3", "'tis", "plain", "''@"]
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "war", "note": n} for n in notes])
    run(model, source, tmp_path / "out.csv")
    shown = [r["note"] for r in rows_of(tmp_path / "out.csv")]
    assert shown[:7] == ["'=1+1", "'+a", "'-b", "'@c", "'\tx", "'\r=", "''=quoted"]
    assert shown[7:11] == notes[7:11]
    assert [unescape_formula(n) for n in shown] == notes
    run(model, source, tmp_path / "raw.csv", csv_escape=False)
    assert [r["note"] for r in rows_of(tmp_path / "raw.csv")] == notes


def test_abstained_says_where_the_stance_is_unsure(model, source, tmp_path, monkeypatch):
    scores = sorted(r["stance_score"] for r in model.predict_table(pyarrow.table(
        {"text": [r["text"] for r in rows_of(source)], "speaker": [r["speaker"] for r in rows_of(source)]}
    )).to_pylist())  # fmt: skip
    threshold = next((a + b) / 2 for a, b in itertools.pairwise(scores[50:]) if b - a > 1e-5)
    monkeypatch.setattr(model, "meta", {**model.meta, "abstention": {"stance": [[0.9, threshold]]}})
    run(model, source, tmp_path / "out.parquet", abstain_at=0.9)
    for row in rows_of(tmp_path / "out.parquet"):
        assert row["abstained"] is (row["stance_score"] < threshold)
    assert 20 < sum(r["abstained"] for r in rows_of(tmp_path / "out.parquet")) < 80


# --- bad rows ------------------------------------------------------------------------------------

BAD = [
    b'{"text": "good one", "n": 1}', b'{"text": ""}', b'{"n": 3}', b'{"text": 7, "n": 4}', b"{broken",
    b'{"text": "caf\xe9"}', b'{"text": "\x00"}', b'{"text": "\\ud83d"}', b"[1]", b'{"text": "x", "speaker": 3}',
    b'{"text": "good two", "n": 2}',
]  # fmt: skip
REASONS = ["not empty", "is missing", "not empty", "not valid JSON", "not UTF-8", "NUL byte", "lone surrogate",
           "must hold a JSON object", "speaker must be text"]  # fmt: skip


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(BAD) + b"\n")
    return path


def test_bad_rows_are_skipped_and_told(model, bad, tmp_path):
    summary = run(model, bad, tmp_path / "out.jsonl", on_error="skip", part_rows=4)
    assert (summary.labelled, summary.rejected) == (2, 9)
    assert [r["text"] for r in rows_of(tmp_path / "out.jsonl")] == ["good one", "good two"]
    rejects = rows_of(tmp_path / "out.jsonl.rejects.jsonl")
    assert [r["line"] for r in rejects] == list(range(2, 11))
    assert all(reason in r["reason"] for r, reason in zip(rejects, REASONS, strict=True))
    assert rejects[3]["raw"] == "{broken"
    assert json.loads(rejects[2]["raw"]) == {"text": 7, "n": 4}
    assert {r["file"] for r in rejects} == {str(bad)}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_bad_rows_are_kept_without_labels(model, bad, tmp_path, suffix):
    output = tmp_path / f"out{suffix}"
    lines = BAD[:3] + BAD[4:]  # a text of numbers and texts is no Parquet column
    bad.write_bytes(b"\n".join(lines) + b"\n")
    assert run(model, bad, output, on_error="null", part_rows=4).rejected == 8
    rows = rows_of(output)
    assert len(rows) == 10
    assert [bool(r["stance"]) for r in rows] == [True] + [False] * 8 + [True]
    assert {r["lean"] for r in rows[1:-1]} <= {None, ""}
    assert len(rows_of(output.with_name(output.name + ".rejects.jsonl"))) == 8


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_bad_rows_before_the_columns_are_known_have_them_too(model, tmp_path, suffix):
    """A part of bad rows alone is laid out as the others, however the threads run."""
    source = tmp_path / "in.jsonl"
    source.write_text("{broken\n" * 40 + '{"text": "war", "n": 1}\n')
    output = tmp_path / f"out{suffix}"
    assert run(model, source, output, on_error="null", part_rows=4).rejected == 40
    rows = rows_of(output)
    assert len(rows) == 41
    assert all(list(row)[:3] == ["text", "n", "stance"] for row in rows)
    assert {(row["text"], row["stance"]) for row in rows[:40]} <= {("", ""), (None, None)}
    interrupted(model, source, tmp_path / f"again{suffix}", 3, on_error="null", part_rows=4)
    run(model, source, tmp_path / f"again{suffix}", on_error="null", part_rows=4, resume=True)
    assert (tmp_path / f"again{suffix}").read_bytes() == output.read_bytes()


def test_bad_rows_of_standard_input_have_the_columns_too(model, tmp_path, monkeypatch):
    lines = b"{broken\n" * 10 + b'{"text": "war", "n": 1}\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    run(model, [Path("-")], tmp_path / "out.csv", on_error="null", part_rows=4)
    rows = rows_of(tmp_path / "out.csv")
    assert [row["n"] for row in rows] == [""] * 10 + ["1"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_an_input_of_bad_rows_alone_is_kept_without_labels(model, tmp_path, suffix):
    (tmp_path / "in.jsonl").write_text("{broken\n" * 5)
    output = tmp_path / f"out{suffix}"
    assert run(model, tmp_path / "in.jsonl", output, on_error="null", part_rows=4).labelled == 0
    assert [row["stance"] or None for row in rows_of(output)] == [None] * 5


def test_the_first_bad_row_ends_the_run(model, bad, tmp_path):
    with pytest.raises(DataError, match=r"bad\.jsonl:2: text must be text that is not empty"):
        run(model, bad, tmp_path / "out.jsonl")
    assert beside(bad) == {"bad.jsonl"}


def test_broken_csv_rows_are_bad_rows(model, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_bytes(b'text,n\nwar,1\nwar\n"x"y,2\ncaf\xe9,3\n"two\nlines",4\npeace,5\n"open,6\nlast,7\n')
    assert run(model, path, tmp_path / "out.csv", on_error="skip").labelled == 3
    assert [r["text"] for r in rows_of(tmp_path / "out.csv")] == ["war", "two\nlines", "peace"]
    rejects = rows_of(tmp_path / "out.csv.rejects.jsonl")
    assert [r["line"] for r in rejects] == [3, 4, 5, 9]
    assert rejects[3]["raw"] == '"open,6\nlast,7'


def test_a_table_without_the_text_column_is_no_matter_of_rows(model, tmp_path):
    (tmp_path / "in.csv").write_text("quote\nwar\n")
    with pytest.raises(DataError, match="column 'text' is missing; got quote"):
        run(model, tmp_path / "in.csv", tmp_path / "out.csv", on_error="skip")


def test_bad_parquet_rows_are_skipped_or_null(model, tmp_path):
    table = pyarrow.table({"text": ["war", None, "peace", " "], "n": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    run(model, tmp_path / "in.parquet", tmp_path / "skip.parquet", on_error="skip")
    run(model, tmp_path / "in.parquet", tmp_path / "null.parquet", on_error="null")
    assert [r["n"] for r in rows_of(tmp_path / "skip.parquet")] == [1, 3]
    assert [(r["n"], r["stance"] is None) for r in rows_of(tmp_path / "null.parquet")] == [
        (1, False), (2, True), (3, False), (4, True),
    ]  # fmt: skip
    assert rows_of(tmp_path / "skip.parquet.rejects.jsonl")[0]["line"] == 2


def parquet(path: Path, columns: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_files_of_other_types_are_refused_before_a_row_is_labelled(model, tmp_path):
    one = parquet(tmp_path / "a.parquet", {"text": ["war"] * 40, "n": range(40)})
    other = parquet(tmp_path / "b.parquet", {"text": ["war"], "n": ["x"]})
    with pytest.raises(DataError, match=r"b\.parquet: columns must have the types .* int64 vs string"):
        run(model, [one, other], tmp_path / "out.parquet")
    assert beside(one) == {"a.parquet", "b.parquet"}
    run(model, [one, other], tmp_path / "out.jsonl")  # which has no types
    assert [r["n"] for r in rows_of(tmp_path / "out.jsonl")] == [*range(40), "x"]


def test_parquet_files_of_kindred_types_are_one_output(model, tmp_path):
    small = parquet(tmp_path / "a.parquet", {"text": ["war"], "n": pyarrow.array([1], pyarrow.int8())})
    large = parquet(tmp_path / "b.parquet", {"n": [2**40], "text": ["peace"]})
    run(model, [small, large], tmp_path / "out.parquet")
    assert [(r["text"], r["n"]) for r in rows_of(tmp_path / "out.parquet")] == [("war", 1), ("peace", 2**40)]


def test_an_empty_parquet_file_of_other_columns_is_refused(model, tmp_path):
    empty = parquet(tmp_path / "a.parquet", {"text": pyarrow.array([], pyarrow.string()), "x": []})
    full = parquet(tmp_path / "b.parquet", {"text": ["war"], "y": [1]})
    with pytest.raises(DataError, match=r"b\.parquet: columns must be those of .*: text, x; got text, y"):
        run(model, [empty, full], tmp_path / "out.parquet")


@pytest.mark.parametrize("into", ["out.parquet", "out.jsonl"])
def test_a_parquet_column_that_stands_twice_is_refused(model, tmp_path, into):
    table = pyarrow.Table.from_arrays([pyarrow.array(["war"])] * 3, ["text", "n", "n"])
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(DataError, match=r"in\.parquet: columns stand twice: 'n'"):
        run(model, tmp_path / "in.parquet", tmp_path / into)


@pytest.mark.parametrize("into", ["out.parquet", "out.jsonl"])
@pytest.mark.parametrize("coded", [False, True])
def test_a_parquet_text_that_is_not_utf8_is_a_bad_row(model, tmp_path, into, coded):
    plain = pyarrow.array([b"war", b"caf\xe9", b"peace"])
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, plain.buffers())
    columns = {"text": texts.dictionary_encode() if coded else texts, "n": [1, 2, 3]}
    source = parquet(tmp_path / "in.parquet", columns)
    with pytest.raises(DataError, match=r"in\.parquet:2: a text is not UTF-8"):
        run(model, source, tmp_path / into)
    assert run(model, source, tmp_path / into, on_error="skip", force=True).rejected == 1
    assert [r["n"] for r in rows_of(tmp_path / into)] == [1, 3]
    (reject,) = rows_of(tmp_path / f"{into}.rejects.jsonl")
    assert json.loads(reject["raw"]) == {"text": "caf\\xe9", "n": 2}
    if into == "out.parquet":  # the bytes stay as they are
        run(model, source, tmp_path / into, on_error="null", force=True)
        labels = pyarrow.parquet.read_table(tmp_path / into).select(["n", "stance"]).to_pylist()
        assert [(r["n"], r["stance"] is None) for r in labels] == [(1, False), (2, True), (3, False)]


# --- interrupted runs ----------------------------------------------------------------------------


class Stop(BaseException):
    """As Ctrl-C or a crash would end a run."""


def interrupted(model, source, output, after: int, **options) -> None:
    """Run until ``after`` parts were committed."""
    commit, number = WorkFolder.commit, 0

    def counted(self, progress):
        nonlocal number
        commit(self, progress)
        number += 1
        if number == after:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "commit", counted)
        with pytest.raises(Stop):
            run(model, source, output, **options)
    assert not output.exists()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("after", [1, 3])
def test_a_resumed_run_gives_the_very_bytes(model, source, tmp_path, suffix, after):
    run(model, source, tmp_path / f"whole{suffix}")
    output = tmp_path / f"out{suffix}"
    interrupted(model, source, output, after)
    summary = run(model, source, output, resume=True)
    assert (summary.labelled, summary.resumed) == (100, after * 16)
    assert output.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert not any(name.startswith(".out") for name in beside(output))


def test_a_resumed_run_keeps_shard_and_rejects(model, bad, tmp_path):
    bad.write_bytes(b"\n".join(BAD * 20) + b"\n")
    options = {"on_error": "null", "shard": (1, 2)}
    run(model, bad, tmp_path / "whole.csv", **options)
    interrupted(model, bad, tmp_path / "out.csv", 4, **options)
    run(model, bad, tmp_path / "out.csv", resume=True, **options)
    for name in ("{}.csv", "{}.csv.rejects.jsonl"):
        assert (tmp_path / name.format("out")).read_bytes() == (tmp_path / name.format("whole")).read_bytes()


@pytest.mark.slow
def test_a_killed_process_is_resumed(trained, tmp_path):
    rows = [{"text": f"we will meet on day {i}", "id": i} for i in range(9000)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    command = [sys.executable, "-m", "stance", "predict", str(trained), str(source), "--exact", "-o"]
    subprocess.run([*command, str(tmp_path / "whole.csv")], check=True, capture_output=True)
    output = tmp_path / "out.csv"
    process = subprocess.Popen([*command, str(output)], stderr=subprocess.DEVNULL)
    state = tmp_path / ".out.csv.stance" / "state.json"
    while process.poll() is None:
        if state.exists() and json.loads(state.read_text())["progress"]["rows"]:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.wait()
    if process.returncode != 0:  # otherwise it was quicker than we are
        refused = subprocess.run([*command, str(output)], capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert "an earlier run was not finished - go on with --resume" in refused.stderr
        subprocess.run([*command, str(output), "--resume"], check=True, capture_output=True)
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_only_the_same_run_is_resumed(model, trained, source, tmp_path):
    output = tmp_path / "out.jsonl"
    interrupted(model, source, output, 2)
    before = {p.name: p.read_bytes() for p in (tmp_path / ".out.jsonl.stance").iterdir()}
    with pytest.raises(UsageError, match="must go on with the same options"):
        run(model, source, output, resume=True, probabilities=True)
    other = write_jsonl(tmp_path / "in2.jsonl", rows_of(source)[:-1])
    other.rename(source)
    with pytest.raises(UsageError, match="must go on with the same input"):
        run(model, source, output, resume=True)
    folder = Path(shutil.copytree(trained, tmp_path / "model"))
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text() + "\n")
    with pytest.raises(UsageError, match="must go on with the same model"):
        run(load(folder, device="cpu", exact=True), source, output, resume=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / ".out.jsonl.stance").iterdir()} == before
    with pytest.raises(UsageError, match=r"go on with --resume, or begin anew with --force"):
        run(model, source, output)
    assert run(model, source, output, force=True).labelled == 99


def test_after_a_bad_row_the_rows_before_are_kept(model, tmp_path):
    rows = [{"text": f"war {i}"} for i in range(40)]
    source = write_jsonl(tmp_path / "in.jsonl", [*rows, {"text": ""}, {"text": "peace"}])
    lines: list[str] = []
    with pytest.raises(DataError, match=r"in\.jsonl:41: "):
        run(model, source, tmp_path / "out.csv", log=lines.append)
    assert "32 rows are done and kept" in lines[0]
    run(model, source, tmp_path / "out.csv", resume=True, on_error="skip")
    run(model, source, tmp_path / "whole.csv", on_error="skip")
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize("resume", [False, True])
def test_types_that_no_column_can_hold_end_the_run_early(model, tmp_path, resume):
    """At the part that brings them, not after all is labelled; what is done cannot be gone on with."""
    numbers = [{"text": f"war {i}", "id": i} for i in range(32)]
    source = write_jsonl(tmp_path / "in.jsonl", [*numbers, *[{"text": "peace", "id": "x"}] * 400])
    if resume:
        interrupted(model, source, tmp_path / "out.parquet", 2)
    lines: list[str] = []
    with pytest.raises(DataError, match=r"Parquet cannot hold these columns: .*id.* - write \.jsonl"):
        run(model, source, tmp_path / "out.parquet", log=lines.append, resume=resume)
    assert not any("--on-error" in line for line in lines)
    state = json.loads((tmp_path / ".out.parquet.stance" / "state.json").read_text())
    assert state["progress"]["rows"] == 32


def test_a_full_disk_loses_nothing(model, source, tmp_path, monkeypatch):
    run(model, source, tmp_path / "whole.csv")
    sync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((StanceError, OSError), match="No space left on device"):
        run(model, source, tmp_path / "out.csv")
    monkeypatch.setattr(os, "fsync", sync)
    assert not (tmp_path / "out.csv").exists()
    assert run(model, source, tmp_path / "out.csv", resume=True).resumed > 0
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_finished_run_is_not_done_again(model, source, tmp_path, monkeypatch):
    run(model, source, tmp_path / "out.csv")
    monkeypatch.setattr("stance.predicting.Source", None)  # would be called
    summary = run(model, source, tmp_path / "out.csv", resume=True)
    assert summary.finished
    assert summary.labelled == 100
    with pytest.raises(UsageError, match="exists already, of another run"):
        run(model, source, tmp_path / "out.csv", resume=True, prefix="p_")


def test_a_run_killed_while_it_cleans_up_is_finished(model, source, tmp_path, monkeypatch):
    def killed(path):
        (path / "part-000000").unlink()
        raise Stop

    monkeypatch.setattr("stance.parts.remove_locked", killed)
    with pytest.raises(Stop):
        run(model, source, tmp_path / "out.csv")
    monkeypatch.undo()
    before = (tmp_path / "out.csv").read_bytes()
    assert run(model, source, tmp_path / "out.csv", resume=True).finished
    assert (tmp_path / "out.csv").read_bytes() == before
    assert beside(tmp_path / "out.csv") == {"in.jsonl", "out.csv", "out.csv.meta.json"}


def test_a_run_killed_while_it_begins_anew_leaves_nothing_to_resume(model, source, tmp_path, monkeypatch):
    interrupted(model, source, tmp_path / "out.csv", 2)
    unlink = Path.unlink

    def killed(path, missing_ok=False):
        unlink(path, missing_ok)
        if path.name.startswith("part-"):
            raise Stop

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(Stop):
        run(model, source, tmp_path / "out.csv", force=True)
    monkeypatch.undo()
    summary = run(model, source, tmp_path / "out.csv", resume=True)
    assert (summary.labelled, summary.resumed) == (100, 0)


def test_the_rows_written_are_counted_when_on_error_changes(model, bad, tmp_path):
    bad.write_bytes(b"\n".join(BAD * 8) + b"\n")
    interrupted(model, bad, tmp_path / "out.jsonl", 2, on_error="null")
    run(model, bad, tmp_path / "out.jsonl", on_error="skip", resume=True)
    meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
    assert meta["rows"] == len(rows_of(tmp_path / "out.jsonl"))
    assert meta["rows"] > meta["labelled"] == 16


def test_the_name_of_the_work_folder_is_on_the_disk_before_its_state(model, source, tmp_path, monkeypatch):
    synced: list[Path] = []
    monkeypatch.setattr("stance.parts.sync_folder", synced.append)
    run(model, source, tmp_path / "out.csv")
    assert synced[0] == tmp_path


@pytest.mark.parametrize("call", [{}, {"force": True}, {"resume": True}])
def test_the_input_is_not_overwritten(source, tmp_path, call):
    (tmp_path / "link.jsonl").symlink_to(source)
    for name in (source, tmp_path / "x" / ".." / "in.jsonl", tmp_path / "link.jsonl"):
        with pytest.raises(UsageError, match="is the input, which would be lost - choose another name"):
            check_call([str(source)], str(name), Options(), **call)


def test_two_processes_do_not_write_one_output(model, source, tmp_path):
    other = WorkFolder(tmp_path / "out.csv")
    other.open({"input": "x"}, resume=False)
    with pytest.raises(UsageError, match=r"out\.csv: another process is writing it"):
        run(model, source, tmp_path / "out.csv")
    other.close()
    assert run(model, source, tmp_path / "out.csv").labelled == 100


def test_a_run_under_way_is_not_told_as_one_that_was_not_finished(model, source, tmp_path):
    output = tmp_path / "out.csv"
    interrupted(model, source, output, 2)
    with (
        hold(tmp_path / ".out.csv.stance" / "lock", output),
        pytest.raises(UsageError, match=r"out\.csv: another process is writing it"),
    ):
        check_call([str(source)], str(output), Options())
    with pytest.raises(UsageError, match="an earlier run was not finished"):
        check_call([str(source)], str(output), Options())


def test_what_another_process_has_just_written_is_not_overwritten(model, source, tmp_path, monkeypatch):
    """It was not there when the call was checked."""
    taken = predicting.identity

    def meanwhile(*arguments, **options):
        (tmp_path / "out.csv").write_text("theirs")
        return taken(*arguments, **options)

    monkeypatch.setattr(predicting, "identity", meanwhile)
    with pytest.raises(UsageError, match=r"out\.csv: another process has just written it"):
        run(model, source, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "theirs"
    assert beside(tmp_path / "out.csv") == {"in.jsonl", "out.csv"}
    assert run(model, source, tmp_path / "out.csv", force=True).labelled == 100


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "output", "call", "message"),
    [
        (["a.jsonl"], "out.csv", {"resume": True, "force": True}, "exclude each other"),
        (["-"], "out.csv", {"resume": True}, "standard input and output cannot be taken up again"),
        (["a.jsonl"], "-", {"resume": True}, "standard input and output cannot be taken up again"),
        (["a.xls"], "-", {}, "the suffix must be one of"),
        (["-", "a.jsonl"], "-", {}, "must be the only input"),
        (["a.jsonl"], "out.txt.gz", {}, "plain text cannot hold predictions"),
        (["a.jsonl"], "out.parquet.gz", {}, "the suffix must be one of"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(paths, output, call, message):
    with pytest.raises(UsageError, match=message):
        check_call(paths, output, Options(), **call)


def test_predictions_need_other_names_than_the_columns(model, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "war"}] * 20 + [{"text": "war", "lean": 1}])
    with pytest.raises(UsageError, match="got lean - set the added ones apart with --prefix"):
        run(model, source, tmp_path / "out.jsonl")


def test_memory_does_not_grow_with_the_rows(model, tmp_path):
    """No more parts are under way at once than the pipeline holds."""
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": f"war {i}"} for i in range(800)])
    alive, most = 0, 0
    keep, cut = WorkFolder.keep, source_module.cut

    def counted_cut(rows, options):
        nonlocal alive, most
        for part in cut(rows, options):
            alive += 1
            most = max(most, alive)
            yield part

    def counted_keep(self, part):
        nonlocal alive
        keep(self, part)
        alive -= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_module, "cut", counted_cut)
        patch.setattr(WorkFolder, "keep", counted_keep)
        run(model, source, tmp_path / "out.csv", part_rows=10)
    assert alive == 0
    assert most <= 7


def test_long_texts_end_a_part_early(model, tmp_path):
    rows = [{"text": "war " * (1 + 10 * (i % 3))} for i in range(30)]
    paths = [str(write_jsonl(tmp_path / "a.jsonl", rows))]
    parts = list(Source(paths, Options(part_characters=100), arrow=False).parts())
    assert max(sum(len(r.data["text"]) for r in part.rows) for part in parts) < 100 + 90
    assert sum(len(part.rows) for part in parts) == 30
    assert len(parts) == 10
