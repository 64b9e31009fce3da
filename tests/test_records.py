"""Rows survive a round trip, and what is wrong with a file is said with its line."""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stance.errors import DataError, StanceError, UsageError
from stance.records import FORMATS, expand_files, file_format, read_records, write_records

COLUMNS = ["text", "Sprecher", "id"]

# UTF-8 has no lone surrogates, and the CSV reader takes NUL for damage.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
texts = st.text(characters, max_size=20) | st.sampled_from(
    ["NA", "null", "1.0", '"', "a\r\nb", "\ufeffx", " a "]
)
tables = st.lists(st.fixed_dictionaries(dict.fromkeys(COLUMNS, texts)), max_size=8)


@pytest.fixture
def make(tmp_path):
    """Write bytes to a file of a name; return its path."""

    def write(name: str, data: bytes | str) -> str:
        path = tmp_path / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return str(path)

    return write


def rows_of(path, format=None) -> list[tuple[int, dict]]:
    return [(r.line, r.data) for r in read_records(path, format)]


def failure(path, kind: type[StanceError] = DataError, format=None) -> tuple[list[int], str]:
    """The lines read before a failure, and its message."""
    lines = []
    with pytest.raises(kind) as caught:  # noqa: PT012
        for record in read_records(path, format):
            lines.append(record.line)
    return lines, str(caught.value)


# round trips


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@settings(deadline=None, max_examples=50, report_multiple_bugs=False)
@given(rows=tables)
def test_any_unicode_comes_back_as_written(suffix, rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"rows{suffix}")
        assert write_records(iter(rows), path, COLUMNS) == len(rows)
        assert [r.data for r in read_records(path)] == rows
        assert [p.name for p in Path(folder).iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_numbers_nulls_and_mappings_keep_their_types(tmp_path, suffix):
    rows = [
        {"id": 1, "score": 0.5, "text": None, "codes": {"a1": {"x": "é"}}, "tags": ["a", "b"], "nul": "\0"},
        {"id": 2, "score": -1e300, "text": "t", "codes": {"a1": {"x": None}}, "tags": [], "nul": ""},
    ]
    path = tmp_path / f"rows{suffix}"
    write_records(rows, path, list(rows[0]))
    assert [r.data for r in read_records(path)] == rows


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_carriage_return_alone_stays_inside_its_cell(tmp_path, suffix):
    """csv.writer does not quote it unless the line terminator holds one."""
    rows = [{"a": "one\rtwo", "b": "\r"}]
    write_records(rows, tmp_path / f"rows{suffix}", ["a", "b"])
    assert [r.data for r in read_records(tmp_path / f"rows{suffix}")] == rows


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_delimited_cells_are_text_with_json_for_lists_and_mappings(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    write_records(
        [{"a": 1, "b": None, "c": {"ä": [1, None]}, "left out": 3}, {"c": []}], path, ["c", "a", "b"]
    )
    assert [list(r.data.items()) for r in read_records(path)] == [
        [("c", '{"ä": [1, null]}'), ("a", "1"), ("b", "")],
        [("c", "[]"), ("a", ""), ("b", "")],
    ]


def test_a_parquet_file_holds_the_columns_asked_for_even_without_rows(tmp_path):
    import pyarrow.parquet

    for rows in ([{"b": "x", "a": "y", "c": "z"}], []):
        write_records(rows, tmp_path / "rows.parquet", ["a", "b"])
        assert pyarrow.parquet.read_schema(tmp_path / "rows.parquet").names == ["a", "b"]


def test_more_rows_than_a_parquet_batch_are_numbered_on(tmp_path):
    write_records(({"n": n} for n in range(2500)), tmp_path / "n.parquet", ["n"])
    assert rows_of(tmp_path / "n.parquet") == [(n + 1, {"n": n}) for n in range(2500)]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_text_that_utf8_cannot_hold_is_an_error_of_the_package(tmp_path, suffix):
    """A lone surrogate reaches us as ``"\\ud800"`` in JSON."""
    with pytest.raises(StanceError):
        write_records([{"a": "\ud800"}], tmp_path / f"rows{suffix}", ["a"])
    assert list(tmp_path.iterdir()) == []


def test_a_lone_surrogate_in_json_is_a_problem_of_its_line(make):
    lines, message = failure(make("s.jsonl", '{"text": "fine"}\n{"text": "\\ud800"}\n'))
    assert lines == [1]
    assert "s.jsonl:2: " in message


def test_parquet_refuses_a_column_of_two_types_with_an_error_of_the_package(tmp_path):
    with pytest.raises(StanceError):
        write_records([{"a": 1}, {"a": "x"}], tmp_path / "rows.parquet", ["a"])


# lines


def test_delimited_rows_are_numbered_by_their_first_line(make):
    data = 'text,id\n"one\ntwo\n\nthree",1\n\nb,2\n"c ""quoted"", and",3\n'
    assert rows_of(make("a.csv", data)) == [
        (2, {"text": "one\ntwo\n\nthree", "id": "1"}),
        (7, {"text": "b", "id": "2"}),
        (8, {"text": 'c "quoted", and', "id": "3"}),
    ]
    windows = rows_of(make("w.csv", data.replace("\n", "\r\n")))
    assert [line for line, _ in windows] == [2, 7, 8]
    assert windows[0][1]["text"] == "one\r\ntwo\r\n\r\nthree"


@pytest.mark.parametrize("cells", ["c", "c,3,4"])
def test_a_ragged_row_is_named_by_its_first_line(make, cells):
    lines, message = failure(make("a.csv", f'text,id\n"a\nb",1\n{cells}\n'))
    assert lines == [2]
    assert f"a.csv:4: the row must have 2 cells like the header; got {cells.count(',') + 1}" in message


def test_a_ragged_multi_line_row_is_named_by_its_first_line(make):
    assert "a.csv:3: the row must have 2 cells" in failure(make("a.csv", 'text,id\na,1\n"b\nc\nd"\ne,2\n'))[1]


@pytest.mark.parametrize("data", ['text,id\na,1\nb,"2\nc,3\n', 'text,id\na,1\nb,"2"x\nc,3\n'])
def test_broken_quotes_are_named_by_the_row_they_begin_in(make, data):
    lines, message = failure(make("a.csv", data))
    assert lines == [2]
    assert "a.csv:3: not valid CSV: " in message


def test_quotes_inside_an_unquoted_cell_are_text(make):
    assert rows_of(make("a.tsv", 'text\tid\nsays "no", twice\t1\n')) == [
        (2, {"text": 'says "no", twice', "id": "1"})
    ]


def test_line_separators_other_than_newlines_do_not_count_as_lines(make):
    for name, data in (
        ("a.csv", "text\na\u2028b\u0085c\x0cd\n"),
        ("a.jsonl", '\n{"text": "a\u2028b\u0085c\x7fd"}\n'),
    ):
        ((line, row),) = rows_of(make(name, data))
        assert line == 2
        assert row["text"].startswith("a\u2028b\u0085c")


def test_columns_that_stand_twice_are_named(make):
    assert (
        "a.csv:1: columns stand twice in the header: 'text'"
        in failure(make("a.csv", "text,id, text\na,1,b\n"))[1]
    )


def test_columns_without_a_name_are_explained(make):
    """Spreadsheets write trailing commas; ``twice in the header: `` alone would not say what is wrong."""
    _, message = failure(make("a.csv", "text,,\na,,\n"))
    assert "''" in message or "name" in message


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ('{"text": ', "not valid JSON"),
        ("{'text': 'a'}", "not valid JSON"),
        ('{"text": "a"} {"text": "b"}', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"id": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[1]", "a line must hold a JSON object; got list"),
        ('"text"', "a line must hold a JSON object; got str"),
        ("null", "a line must hold a JSON object; got NoneType"),
    ],
    ids=lambda value: value[:20],
)
def test_a_bad_json_line_is_named(make, bad, what):
    lines, message = failure(make("a.jsonl", f'{{"text": "ok"}}\n\n  \n{bad}\n{{"text": "after"}}\n'))
    assert lines == [1]
    assert f"a.jsonl:4: {what}" in message


@pytest.mark.parametrize(
    ("name", "row"),
    [("a.csv", b"a,%s"), ("a.tsv", b"a\t%s"), ("a.jsonl", b'{"text": "%s"}'), ("a.txt", b"%s")],
)
@pytest.mark.parametrize("good", [1, 3000])
def test_bytes_that_are_no_text_are_named_by_their_line(make, name, row, good):
    """The line is exact however far into the file it stands."""
    lines = [row % b"ok"] * (good + 1)  # for CSV and TSV the first is the header
    for bad, what in ((b"caf\xe9", "not UTF-8"), (b"\0", "a NUL byte")):
        path = make(name, b"\n".join([*lines, row % bad, row % b"ok", b""]))
        assert failure(path)[1].startswith(f"{path}:{good + 2}: {what}")


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.csv", "text\nx\n"), ("a.tsv", "text\nx\n"), ("a.jsonl", '{"text": "x"}\n'), ("a.txt", "x\n")],
)
def test_a_byte_order_mark_is_no_part_of_the_text(make, name, data):
    ((_, row),) = rows_of(make(name, b"\xef\xbb\xbf" + data.encode()))
    assert row == {"text": "x"}


def test_plain_text_is_one_statement_a_line(make):
    assert rows_of(make("a.txt", "one, two\n\n \t\n three\r\nfour")) == [
        (1, {"text": "one, two"}),
        (4, {"text": " three"}),
        (5, {"text": "four"}),
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.txt"])
def test_an_empty_file_has_no_rows(make, name):
    assert rows_of(make(name, "")) == []


def test_a_cell_can_be_long(make):
    ((_, row),) = rows_of(make("a.csv", "text\n" + "x" * 300_000 + "\n"))
    assert len(row["text"]) == 300_000


@pytest.mark.parametrize("data", [b"", b"no parquet", b"PAR1" + b"x" * 40 + b"PAR1"])
def test_a_damaged_parquet_file_is_named(make, data):
    assert "a.parquet: not a Parquet file" in failure(make("a.parquet", data))[1]


def test_a_parquet_file_damaged_inside_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    write_records([{"a": f"{n}" * 50} for n in range(200)], path, ["a"])
    damaged = bytearray(path.read_bytes())
    damaged[10:200] = b"\xff" * 190
    path.write_bytes(damaged)
    assert "a.parquet" in failure(path, StanceError)[1]


def test_a_record_says_where_it_stands(make):
    path = make("a.jsonl", '{"text": "a"}\n')
    (record,) = read_records(path)
    assert record.where == f"{path}:1"


def test_reading_is_lazy(make):
    """Rows before a bad one can be used, and a long file is not read to give its first row."""
    assert next(read_records(make("a.jsonl", '{"text": "a"}\nbroken'))).data == {"text": "a"}


# files


def test_the_suffix_tells_the_format():
    assert {file_format(f"x{suffix}") for suffix in FORMATS} == {"csv", "tsv", "jsonl", "parquet", "text"}
    assert file_format(Path("A.JSONL")) == "jsonl"
    with pytest.raises(UsageError, match=r"x\.json: the suffix must be one of .*did you mean '\.jsonl'\?"):
        file_format("x.json")
    with pytest.raises(UsageError, match=r"notes: the suffix must be one of .*got 'none'"):
        file_format("notes")


def test_a_format_given_outweighs_the_suffix_and_must_be_known(make):
    path = make("a.data", '{"text": "a"}\n')
    assert rows_of(path, "jsonl") == [(1, {"text": "a"})]
    assert failure(path, UsageError)[0] == []
    assert "xlsx" in failure(path, UsageError, "xlsx")[1]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".txt"])
def test_missing_files_and_folders_cannot_be_read(tmp_path, suffix):
    assert "cannot be read" in failure(tmp_path / f"missing{suffix}", UsageError)[1]
    (tmp_path / f"folder{suffix}").mkdir()
    assert "cannot be read" in failure(tmp_path / f"folder{suffix}", UsageError)[1]


@pytest.fixture
def folder(tmp_path):
    for name in ("b.csv", "a.jsonl", "notes.md", "c.PARQUET", "sub.csv/d.csv"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("")
    (tmp_path / "empty").mkdir()
    return tmp_path / "data"


def names(files: list[str]) -> list[str]:
    return [Path(f).name for f in files]


def test_a_folder_gives_its_readable_files_sorted(folder):
    assert names(expand_files([folder])) == ["a.jsonl", "b.csv", "c.PARQUET"]


def test_a_glob_gives_the_files_it_matches_sorted(folder):
    assert names(expand_files([f"{folder}/[ab]*"])) == ["a.jsonl", "b.csv"]
    assert names(expand_files([folder / "*.jsonl"])) == ["a.jsonl"]


def test_a_glob_passes_over_what_no_format_reads(folder):
    assert names(expand_files([f"{folder}/*"])) == ["a.jsonl", "b.csv", "c.PARQUET"]
    with pytest.raises(UsageError):
        expand_files([f"{folder.parent}/emp*"])


def test_files_keep_their_order_and_come_once(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert expand_files(["b.csv", "a.jsonl", "b.csv", "-", "[ab].*"]) == ["b.csv", "a.jsonl", "-"]


def test_one_file_by_two_spellings_comes_once(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert len(expand_files(["b.csv", "./b.csv", str(folder / "b.csv")])) == 1


def test_a_file_whose_name_looks_like_a_glob_is_that_file(make):
    path = make("a[1].csv", "text\n")
    assert expand_files([path]) == [path]


def test_what_matches_nothing_is_named(folder):
    with pytest.raises(UsageError, match=r"b\.cvs: no such file or folder; did you mean '.*b\.csv'\?"):
        expand_files([folder / "b.cvs"])
    with pytest.raises(UsageError, match=r"zz\*: no such file or folder"):
        expand_files([folder / "b.csv", f"{folder}/zz*"])
    with pytest.raises(UsageError, match="no such file or folder"):
        expand_files([folder / "no" / "such" / "place.csv"])
    with pytest.raises(UsageError, match=r"empty: the folder holds no \.csv"):
        expand_files([folder.parent / "empty"])


# standard input and output


def stdin_of(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


def test_standard_input_is_jsonl_in_utf8_unless_said_otherwise(monkeypatch):
    stdin_of(monkeypatch, '\ufeff{"text": "é"}\n\n{"text": "b"}\n'.encode())
    assert rows_of("-") == [(1, {"text": "é"}), (3, {"text": "b"})]
    stdin_of(monkeypatch, 'text,id\n"a\nb",é\n'.encode())
    assert rows_of("-", "csv") == [(2, {"text": "a\nb", "id": "é"})]


def test_problems_of_standard_input_have_lines(monkeypatch):
    stdin_of(monkeypatch, b'{"text": "a"}\nbroken\n')
    lines, message = failure("-")
    assert lines == [1]
    assert message.startswith("-:2: not valid JSON")


def test_standard_output_gets_jsonl(capsys):
    assert write_records(iter([{"a": "é", "b": [1]}, {"a": None}]), "-", ["a"]) == 2
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"a": "é", "b": [1]},
        {"a": None},
    ]


# whole files or none


def failing():
    yield {"a": "new"}
    raise DataError("x.csv:3: broken")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_failing_generator_leaves_no_file(tmp_path, suffix):
    with pytest.raises(DataError, match="broken"):
        write_records(failing(), tmp_path / f"rows{suffix}", ["a"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_failing_generator_keeps_the_old_file(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    write_records([{"a": "old"}], path, ["a"])
    before = path.read_bytes()
    with pytest.raises(DataError, match="broken"):
        write_records(failing(), path, ["a"])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    write_records([{"a": "new"}], path, ["a"])
    assert [r.data for r in read_records(path)] == [{"a": "new"}]


def test_a_file_is_not_visible_before_it_is_whole(tmp_path):
    path = tmp_path / "rows.csv"

    def rows():
        assert not path.exists()
        yield {"a": 1}
        assert not path.exists()

    assert write_records(rows(), path, ["a"]) == 1
    assert path.exists()


def test_folders_on_the_way_are_made(tmp_path):
    assert write_records([{"a": 1}], tmp_path / "new" / "er" / "rows.csv", ["a"]) == 1
    assert (tmp_path / "new" / "er" / "rows.csv").read_text().split() == ["a", "1"]


@pytest.mark.parametrize("name", ["rows.txt", "rows.xls", "rows"])
def test_formats_that_hold_no_rows_are_refused(tmp_path, name):
    with pytest.raises(UsageError):
        write_records([{"a": 1}], tmp_path / name, ["a"])
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "folder.csv", tmp_path / "file" / "rows.csv"):
        with pytest.raises(StanceError, match=path.name):
            write_records([{"a": 1}], path, ["a"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.csv"]
