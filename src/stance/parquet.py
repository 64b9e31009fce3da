"""Parquet files as Arrow record batches: types stay, rows have numbers, texts that are not UTF-8 harm nobody else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from stance.errors import DataError, UsageError

__all__ = ["decoded_rows", "read_batches", "read_schema", "row_sizes", "text_columns"]


def read_batches(
    name: str, columns: Sequence[str] | None = None, rows: int = 256, start: int = 0
) -> Iterator[tuple[int, Any]]:
    """Yield a Parquet file as Arrow record batches, each with the number of its first row (from 1).

    Args:
        name: the file.
        columns: those to read; default: all.
        rows: of a batch, at most; a batch does not reach beyond its row group.
        start: rows to pass over.

    Raises:
        DataError: it is no Parquet file, or damaged.
        UsageError: it cannot be opened.
    """
    number = 0
    with _parquet(name) as file:
        for group in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if number + size <= start:
                number += size
                continue
            for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
                passed = min(max(start - number, 0), batch.num_rows)
                if passed < batch.num_rows:
                    yield number + passed + 1, batch.slice(passed)
                number += batch.num_rows


def read_schema(name: str) -> Any:
    """Return the Arrow schema of a Parquet file; errors as :func:`read_batches`."""
    with _parquet(name) as file:
        return file.schema_arrow


@contextmanager
def _parquet(name: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with open(name, "rb") as handle, pyarrow.parquet.ParquetFile(handle) as file:
            names = file.schema_arrow.names
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise DataError(f"{name}: columns stand twice: {', '.join(map(repr, twice))} - rename them")
            yield file
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{name}: not a Parquet file: {error}") from None
    except OSError as error:
        if error.errno is None:  # damaged inside
            raise DataError(f"{name}: the Parquet file is damaged: {error}") from None
        raise UsageError(f"{name}: cannot be read: {error.strerror or error}") from None


def decoded_rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of an Arrow record batch; None for one whose text is not UTF-8."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:  # before the first row: the list is made as a whole
        pass
    for index in range(batch.num_rows):
        try:
            yield batch.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield None


def text_columns(name: str) -> list[str]:
    """Return the columns of a Parquet file that :func:`row_sizes` counts; errors as :func:`read_batches`."""
    return [field.name for field in read_schema(name) if _holds_text(field.type)]


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    plain = kind.value_type if types.is_dictionary(kind) else kind
    return bool(
        types.is_string(plain)
        or types.is_large_string(plain)
        or types.is_binary(plain)
        or types.is_large_binary(plain)
    )


def row_sizes(batch: Any) -> list[int]:
    """Return the bytes of the texts in each row of an Arrow record batch."""
    import numpy as np
    import pyarrow.compute

    total = np.zeros(batch.num_rows, dtype=np.int64)
    for column in batch.columns:
        if _holds_text(column.type):
            plain = column.dictionary_decode() if hasattr(column, "dictionary_decode") else column
            total += pyarrow.compute.binary_length(plain).fill_null(0).to_numpy(zero_copy_only=False)
    sizes: list[int] = total.tolist()
    return sizes
