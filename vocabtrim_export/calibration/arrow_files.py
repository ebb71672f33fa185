"""Parquet and Arrow tables, and zstd streams, read with pyarrow (the extra `data`)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from engines.errors import VocabtrimError
from vocabtrim_export.calibration.records import FIELDS

_ROWS_AT_ONCE = 256


def open_zstd(stream: BinaryIO, path: Path) -> Any:
    """Returns a file object over the decompressed bytes of a zstd stream; reading damaged data raises `OSError`."""
    with _pyarrow(path, "compressed with zstd") as pyarrow:
        return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), "zstd")


def read_table(stream: BinaryIO, path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the rows of a table and the place of each, "data.parquet, row 3".

    A row has the values of the columns that can hold text (strings, lists, structs), and None for the other columns,
    which are not read: a table may carry images.

    Args:
        stream: A Parquet file, an Arrow file (Feather) or an Arrow stream, as `datasets` keeps them; it must seek.
        path: The file's name in messages.

    Raises:
        VocabtrimError: pyarrow is not installed, or the file is damaged.
    """
    begin = stream.read(6)
    stream.seek(0)
    with _pyarrow(path, "a Parquet table" if begin.startswith(b"PAR1") else "an Arrow table") as pyarrow:
        if begin.startswith(b"PAR1"):
            from pyarrow import parquet

            file = parquet.ParquetFile(stream)
            schema = file.schema_arrow
            batches = file.iter_batches(_ROWS_AT_ONCE, columns=_text_columns(pyarrow, schema))
        else:
            is_file = begin == b"ARROW1"
            reader = pyarrow.ipc.open_file(stream) if is_file else pyarrow.ipc.open_stream(stream)
            schema = reader.schema
            columns = _text_columns(pyarrow, schema)
            whole = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            batches = (batch.select(columns) for batch in whole)
        yield from _rows(batches, schema.names, path)


@contextmanager
def _pyarrow(path: Path, what: str) -> Iterator[Any]:
    try:
        import pyarrow
    except ImportError as error:
        raise VocabtrimError(f"{path} is {what}, which needs pyarrow: pip install 'vocabtrim-export[data]'") from error
    try:
        yield pyarrow
    except (
        ValueError,
        pyarrow.ArrowException,
        OSError,
        MemoryError,
    ) as error:  # a damaged length can request all memory
        if isinstance(error, OSError) and error.errno:
            raise
        reason = " ".join(str(error).split())
        raise VocabtrimError(
            f"{path} is {what} that cannot be read ({reason}): get it again, or write .jsonl"
        ) from error


def _text_columns(pyarrow: Any, schema: Any) -> list[str]:
    def holds_text(kind: Any) -> bool:
        types = pyarrow.types
        if types.is_dictionary(kind):
            kind = kind.value_type
        strings = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        return bool(strings or types.is_struct(kind) or types.is_list(kind) or types.is_large_list(kind))

    # a column of bytes with a known field's name is read, so that its records are refused and do not look empty
    return [field.name for field in schema if holds_text(field.type) or field.name in FIELDS]


def _rows(batches: Iterable[Any], names: list[str], path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    numbers = count(1)
    for batch in batches:
        for row in batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows:
            yield f"{path}, row {next(numbers)}", dict.fromkeys(names) | row
