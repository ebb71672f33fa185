"""Files of calibration data and prompts read into records, whatever their format, compression and encoding."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from engines.errors import VocabtrimError
from vocabtrim_export.calibration.arrow_files import open_zstd
from vocabtrim_export.calibration.arrow_files import read_table as read_arrow_table
from vocabtrim_export.calibration.text_files import (
    Records,
    read_json,
    read_json_lines,
    read_table,
    read_text,
    table_cells,
)

# The largest file that is read as a whole, in bytes: a compressed table, or UTF-16 text.
MAX_FILE = 1 << 30
_Reader = Callable[[io.BufferedReader, Path], Records]
_OPENERS: Mapping[str, tuple[bytes, Callable[[BinaryIO, Path], Any]]] = {
    ".gz": (b"\x1f\x8b", lambda stream, _: gzip.GzipFile(fileobj=stream)),
    ".bz2": (b"BZh", lambda stream, _: bz2.BZ2File(stream)),
    ".xz": (b"\xfd7zXZ\0", lambda stream, _: lzma.LZMAFile(stream)),  # noqa: SIM115
    ".zst": (b"\x28\xb5\x2f\xfd", open_zstd),
}
# Tables that pyarrow reads are recognised by their first bytes, whatever their names; an Arrow stream begins with -1.
_TABLES = {".parquet": (b"PAR1",), ".arrow": (b"ARROW1", b"\xff\xff\xff\xff"), ".feather": (b"ARROW1",)}
# Formats that are refused: their first bytes (none: known by name alone), their endings, what each is, and what to do.
_REFUSED: tuple[tuple[bytes, tuple[str, ...], str, str], ...] = (
    (b"PK\x03\x04", (".zip", ".xlsx", ".docx"), "a zip archive or an office document", "unpack it or save it as text"),
    (b"7z\xbc\xaf", (".7z",), "a 7z archive", "unpack it"),
    (b"%PDF", (".pdf",), "a PDF document", "save it as text"),
    (b"\x80\x04", (".pkl", ".pickle", ".pt"), "a pickle", "it is never opened; write .jsonl instead"),
    (b"\x93NUMPY", (".npy", ".npz"), "a numpy array", "write .jsonl instead"),
    (b"GGUF", (".gguf", ".safetensors"), "a file of weights or token counts", "give text, or token counts alone"),
    (b"SQLite", (".sqlite", ".db"), "a database", "write .jsonl instead"),
    (b"\xd0\xcf\x11\xe0", (".doc", ".xls", ".ppt"), "an old office document", "save it as text"),
    (b"Rar!", (".rar",), "a rar archive", "unpack it"),
    (b"", (".tar", ".tgz", ".tbz2", ".txz"), "a tar archive", "unpack it and give the directory"),
    (b"\x04\x22\x4d\x18", (".lz4",), "compressed with lz4", "decompress it, or use .gz or .zst"),
    (b"\x1f\x9d", (".z", ".br", ".lzma", ".sz"), "compressed by a program", "decompress it, or use .gz or .zst"),
)
_BYTE_ORDER_MARKS = (  # the longer ones first: UTF-32's begins like UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_records(path: Path) -> Iterator[tuple[str, object]]:
    """Yield the records of one file and the place of each, "data.jsonl, line 3".

    A .jsonl or .ndjson file holds a JSON value in each line, a .json file one value or a list of them, a .csv or .tsv
    file a header and rows; Parquet and Arrow tables hold rows; any other file is one text, `{"text": …}`. Each may be
    compressed (.gz, .bz2, .xz, .zst). Text is UTF-8, or UTF-16 or UTF-32 with a byte-order mark.

    Raises:
        VocabtrimError: Names the file, and the line or record, that cannot be read.
    """
    try:
        with _open(path) as (stream, read):
            yield from read(stream, path)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise VocabtrimError(f"cannot read {path}: {error.strerror}") from error
        raise VocabtrimError(f"{path} is damaged, it cannot be decompressed ({error}): get it again") from error


@contextmanager
def _open(path: Path) -> Iterator[tuple[io.BufferedReader, _Reader]]:
    """Yields the decompressed bytes of a file, text as UTF-8, and the function that reads them."""
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        begin = file.peek(8)[:8]
        opener = next((opener for magic, opener in _OPENERS.values() if begin.startswith(magic)), None)
        if opener is None:
            if begin and suffix in _OPENERS:
                raise VocabtrimError(f"{path} is not {suffix} data, whatever its name says: rename or decompress it")
            yield _recognise(file, suffix, path)
            return
        inner = Path(path.stem).suffix.lower() if suffix in _OPENERS else suffix
        with io.BufferedReader(opener(file, path)) as expanded:
            if any(expanded.peek(8).startswith(magic) for magic, _ in _OPENERS.values()):
                raise VocabtrimError(f"{path} is compressed twice: decompress it once")
            stream, read = _recognise(expanded, inner, path)
            # pyarrow reads a table from its end, and decompressors seek only forwards
            yield (_buffered(_read_all(stream, path)) if read is _read_columns else stream), read


def _recognise(stream: io.BufferedReader, suffix: str, path: Path) -> tuple[io.BufferedReader, _Reader]:
    begin = stream.peek(8)[:8]
    _refuse(begin, suffix, path)
    if any(begin.startswith(magics) for magics in _TABLES.values()):
        return stream, _read_columns
    if begin and suffix in _TABLES:
        raise VocabtrimError(f"{path} is not {suffix} data, whatever its name says: get it again, or rename it")
    return _as_utf8(stream, path), _READERS.get(suffix, read_text)


def _refuse(begin: bytes, suffix: str, path: Path) -> None:
    for magic, suffixes, what, how in _REFUSED:
        if (magic and begin.startswith(magic)) or (begin and suffix in suffixes):
            raise VocabtrimError(f"{path} is {what}, which is not read: {how}")


def _as_utf8(stream: io.BufferedReader, path: Path) -> io.BufferedReader:
    """Returns the stream behind a byte-order mark, converted where the mark says UTF-16 or UTF-32."""
    begin = stream.peek(4)[:4]
    if begin.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
        return stream
    encoding = next((encoding for mark, encoding in _BYTE_ORDER_MARKS if begin.startswith(mark)), None)
    if encoding is None:
        _check_not_utf16(stream, path)
        return stream
    try:
        text = _read_all(stream, path).decode(encoding)
    except UnicodeDecodeError as error:
        raise VocabtrimError(f"{path} is not {encoding.upper()} as its first bytes say: convert it to UTF-8") from error
    return _buffered(text.encode("utf-8", "replace"))


def _check_not_utf16(stream: io.BufferedReader, path: Path) -> None:
    """Refuse text in UTF-16 without a byte-order mark; mostly Latin letters, so that every other byte is NUL."""
    begin = stream.peek(8)[:8]
    for zeros, encoding in ((begin[1::2], "utf-16le"), (begin[::2], "utf-16be")):
        if len(begin) == 8 and not any(zeros) and any(begin):
            raise VocabtrimError(
                f"{path} seems to be UTF-16 without a byte-order mark: convert it (iconv -f {encoding} -t utf-8)"
            )


def _buffered(data: bytes) -> io.BufferedReader:
    return io.BufferedReader(cast(io.RawIOBase, io.BytesIO(data)))


def _read_all(stream: io.BufferedReader, path: Path) -> bytes:
    data = stream.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise VocabtrimError(f"{path} holds more than {MAX_FILE >> 20} MiB: split it, or write it as .jsonl")
    return data


def _read_columns(stream: io.BufferedReader, path: Path) -> Records:
    for where, row in read_arrow_table(stream, path):
        yield where, table_cells(row)


_READERS: Mapping[str, _Reader] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_table,
    ".tsv": read_table,
}
