"""Parquet outputs in parts: each has the types of its rows, which are brought together at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from stance.errors import DataError

__all__ = ["Agreement", "concat", "join", "of_rows", "write"]

ROW_GROUP = 65_536
"""Rows of a row group of a Parquet output, about."""


@contextmanager
def _named(output: str) -> Iterator[None]:
    """Say of an output what its format cannot hold."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError) as error:
        raise DataError(f"{output}: Parquet cannot hold these columns: {error} - write .jsonl") from None


class Agreement:
    """Whether the parts' types have one that holds them all.

    It is seen at each part, before rows after it are labelled for nothing.

    Args:
        output: the output's name.
    """

    def __init__(self, output: str):
        self._output = output
        self._schema: Any = None

    def add(self, part: Path | IO[bytes]) -> None:
        """Take in a part.

        Raises:
            DataError: there is no such type any more.
        """
        import pyarrow
        import pyarrow.parquet

        with _named(self._output):
            schema = pyarrow.parquet.read_schema(part)
            known = [schema] if self._schema is None else [self._schema, schema]
            self._schema = pyarrow.unify_schemas(known, promote_options="permissive")


def of_rows(output: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Any:
    """Return rows as an Arrow table of these columns, the types from the values."""
    import pyarrow

    with _named(output):
        return pyarrow.table({c: pyarrow.array([row.get(c) for row in rows]) for c in columns})


def concat(output: str, tables: Sequence[Any], schema: Any) -> Any:
    """Return Arrow tables as one of this schema, which has their columns and room for their values."""
    import pyarrow

    with _named(output):
        fitted = [
            pyarrow.table(
                # Arrow cannot cast a slice of some nested types, even to themselves.
                [c if c.type == f.type else c.cast(f.type) for c, f in zip(t.columns, schema, strict=True)],
                schema=schema,
            )
            for t in tables
        ]
        return pyarrow.concat_tables([schema.empty_table(), *fitted])


def write(output: str, handle: IO[bytes], table: Any) -> None:
    """Write one part."""
    import pyarrow.parquet

    with _named(output):
        pyarrow.parquet.write_table(table, handle)


def join(output: str, handle: IO[bytes], parts: Sequence[Path], empty: Any, meta: Mapping[str, Any]) -> None:
    """Write the parts as one file of larger row groups, ``meta`` in the schema's ``stance``."""
    import pyarrow
    import pyarrow.parquet

    with _named(output):
        schemas = [pyarrow.parquet.read_schema(part) for part in parts]
        schema = pyarrow.unify_schemas([empty.schema, *schemas], promote_options="permissive")
        note = {b"stance": json.dumps(meta, ensure_ascii=False).encode()}
        schema = schema.with_metadata({**((schemas or [empty.schema])[0].metadata or {}), **note})
        with pyarrow.parquet.ParquetWriter(handle, schema) as writer:
            waiting: list[Any] = []
            for part in parts:
                waiting.append(pyarrow.parquet.read_table(part).cast(schema))
                if sum(table.num_rows for table in waiting) >= ROW_GROUP:
                    writer.write_table(pyarrow.concat_tables(waiting), ROW_GROUP)
                    waiting = []
            if waiting:
                writer.write_table(pyarrow.concat_tables(waiting), ROW_GROUP)
