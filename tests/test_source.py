"""Parts are the same whether their rows are read in a stream or from where a plan says that they lie."""

from __future__ import annotations

import gzip
import io
import random
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import corpus_rows, write_jsonl
from stance.errors import DataError
from stance.request import Options
from stance.source import ArrowRow, Source, read_blocks


def shown(rows):
    """Rows as they can be compared: those in Arrow by their whole record."""
    return [
        (r.where, r.batch.slice(r.index, 1).to_pylist(), r.data, r.size) if isinstance(r, ArrowRow) else r
        for r in rows
    ]


def same_parts(paths, options, *, arrow=False, stretch=1) -> int:
    """Hold blocks, read in any order, against the stream; return their number."""
    streamed = Source(paths, options, arrow=arrow)
    planned = Source(paths, options, arrow=arrow)
    expected = {part.number: shown(part.rows) for part in streamed.parts()}
    blocks = list(planned.blocks())
    assert planned.rows == streamed.rows
    stretches = [blocks[at : at + stretch] for at in range(0, len(blocks), stretch)]
    random.Random(0).shuffle(stretches)
    found = {p.number: shown(p.rows) for s in stretches for p in read_blocks(s, options, arrow=arrow)}
    assert found == expected
    return len(blocks)


jsonl_lines = st.sampled_from(
    [b'{"text": "war"}', b'{"text": "caf\xc3\xa9", "n": 1}', b"", b"  ", "\u2003".encode(), b"{broken", b"\xff", b"\0",
     b'{"text": "\\ud83d"}', b"[1]", b'{"text": "one"}\r']
)  # fmt: skip
csv_lines = st.sampled_from(
    [
        b"war,1",
        b'"two\nlines",2',
        b"",
        b"one",
        b'"x"y,2',
        b"caf\xe9,3",
        b'"a ""quote""",4',
        b"peace,5\r",
        b"\0,1",
    ]
)


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(jsonl_lines, max_size=30),
    rows=st.integers(1, 7),
    size=st.integers(5, 200),
    shard=st.sampled_from([(1, 1), (2, 3)]),
    mark=st.booleans(),
    end=st.booleans(),
)
def test_any_jsonl(lines, rows, size, shard, mark, end):
    with tempfile.TemporaryDirectory() as name:
        paths = []
        for i, part in enumerate((lines[:9], lines[9:])):
            path = Path(name, f"{i}.jsonl")
            path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + b"\n".join(part) + (b"\n" if end else b""))
            paths.append(str(path))
        options = Options(on_error="skip", part_rows=rows, part_characters=size, shard=shard)
        same_parts(paths, options, stretch=rows)


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(csv_lines, max_size=30), rows=st.integers(1, 7), open_quote=st.booleans())
def test_any_csv(lines, rows, open_quote):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "a.csv")
        path.write_bytes(b"text,n\n" + b"\n".join(lines) + (b'\n"open,1\nlast,2\n' if open_quote else b""))
        same_parts([str(path)], Options(on_error="skip", part_rows=rows), stretch=2)


@pytest.mark.parametrize("arrow", [False, True])
@pytest.mark.parametrize("shard", [(1, 1), (2, 2)])
def test_parquet_of_any_row_groups(tmp_path, arrow, shard):
    paths = []
    for i, (number, group) in enumerate([(700, 1000), (40, 7), (0, 1), (600, 300)]):
        texts = pyarrow.array([f"war {k} {'x' * (k % 90)}" for k in range(number)], pyarrow.string())
        columns = {
            "text": texts,
            "speaker": texts.dictionary_encode(),
            "nested": pyarrow.array([{"a": [k]} for k in range(number)], pyarrow.struct([("a", pyarrow.list_(pyarrow.int64()))])),
        }  # fmt: skip
        paths.append(str(tmp_path / f"{i}.parquet"))
        pyarrow.parquet.write_table(pyarrow.table(columns), paths[-1], row_group_size=group)
    options = Options(part_rows=100, part_characters=9_000, shard=shard)
    assert same_parts(paths, options, arrow=arrow, stretch=3) > 8 // shard[1]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_archives_and_plain_files_together(tmp_path, suffix):
    rows = corpus_rows(300)
    plain = write_jsonl(tmp_path / "a.jsonl", rows[:100]).read_bytes()
    packed = write_jsonl(tmp_path / "b.jsonl", rows[100:]).read_bytes()
    (tmp_path / "b.jsonl").unlink()
    target = tmp_path / f"b.jsonl{suffix}"
    if suffix == ".gz":
        target.write_bytes(gzip.compress(packed))
    else:
        with pyarrow.CompressedOutputStream(str(target), "zstd") as stream:
            stream.write(packed)
    (tmp_path / "c.txt").write_text("we will meet\n\nwar\n" * 10)
    assert plain
    paths = [str(tmp_path / "a.jsonl"), str(target), str(tmp_path / "c.txt")]
    assert same_parts(paths, Options(part_rows=33), stretch=4) == 10


def test_a_table_that_does_not_fit_is_told_before_a_row_is_labelled(tmp_path):
    (tmp_path / "a.csv").write_text("text,x\nwar,1\n")
    (tmp_path / "b.csv").write_text("text,y\nwar,1\n")
    paths = [str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]
    with pytest.raises(DataError, match=r"b\.csv: columns must be those of .*a\.csv: text, x; got text, y"):
        list(Source(paths, Options(), arrow=False).blocks())


def test_a_file_that_was_cut_meanwhile_is_told(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", corpus_rows(20))
    blocks = list(Source([str(path)], Options(part_rows=8), arrow=False).blocks())
    path.write_bytes(b"".join(io.BytesIO(path.read_bytes()).readlines()[:18]))
    with pytest.raises(DataError, match=r"a\.jsonl: has fewer rows than before - leave it alone"):
        list(read_blocks(blocks, Options(part_rows=8), arrow=False))
