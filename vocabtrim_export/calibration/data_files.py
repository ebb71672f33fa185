"""Files of calibration data and prompts read into records, whatever their format, compression and encoding."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, cast

from engines.errors import VocabtrimError
from vocabtrim_export.calibration.arrow_files import open_zstd, read_table

# The longest line of JSONL and the largest file that is read as a whole, in bytes: longer ones were not meant as one.
MAX_LINE, MAX_FILE = 64 << 20, 1 << 30
_NO_DELIMITER = "\x1f"  # stands in no text
_LISTS = ("messages", "conversations", "conversation", "turns", "prompt")  # a table's cell holds these as JSON
_OPENERS: Mapping[str, tuple[bytes, Callable[[BinaryIO, Path], Any]]] = {
    ".gz": (b"\x1f\x8b", lambda stream, _: gzip.GzipFile(fileobj=stream)),
    ".bz2": (b"BZh", lambda stream, _: bz2.BZ2File(stream)),
    ".xz": (b"\xfd7zXZ\0", lambda stream, _: lzma.LZMAFile(stream)),  # noqa: SIM115
    ".zst": (b"\x28\xb5\x2f\xfd", open_zstd),
}
# Tables that pyarrow reads are recognised by how they begin, whatever they are called; an Arrow stream begins with -1.
_TABLES = {".parquet": (b"PAR1",), ".arrow": (b"ARROW1", b"\xff\xff\xff\xff"), ".feather": (b"ARROW1",)}
# Formats that are recognised by how they begin or by their names, to be refused: what they are, and what to do.
_REFUSED: tuple[tuple[bytes, tuple[str, ...], str, str], ...] = (
    (b"PK\x03\x04", (".zip", ".xlsx", ".docx"), "a zip archive or an office document", "unpack it or save it as text"),
    (b"7z\xbc\xaf", (".7z",), "a 7z archive", "unpack it"),
    (b"%PDF", (".pdf",), "a PDF document", "save it as text"),
    (b"\x80\x04", (".pkl", ".pickle", ".pt"), "a pickle", "it is never opened; write .jsonl instead"),
    (b"\x93NUMPY", (".npy", ".npz"), "a numpy array", "write .jsonl instead"),
    (b"SQLite", (".sqlite", ".db"), "a database", "write .jsonl instead"),
)
_BYTE_ORDER_MARKS = (  # the longer ones first: UTF-32's begins like UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_records(path: Path) -> Iterator[tuple[str, object]]:
    """Yield the records of one file and where each stands, "data.jsonl, line 3".

    .jsonl and .ndjson hold a JSON value a line, .json a list of them or one, .csv and .tsv a row each below a header;
    Parquet and Arrow tables a row each; any other file is one text, `{"text": …}`. Each may be compressed (.gz, .bz2,
    .xz, .zst). Text is UTF-8, or UTF-16 or UTF-32 with a byte-order mark.
    Raises `VocabtrimError` naming the file, and the line or record, that cannot be read.
    """
    try:
        with _open(path) as (stream, read):
            yield from read(stream, path)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise VocabtrimError(f"cannot read {path}: {error.strerror}") from error
        raise VocabtrimError(f"{path} is damaged, it cannot be decompressed ({error}): get it again") from error


@contextmanager
def _open(path: Path) -> Iterator[tuple[io.BufferedReader, "_Reader"]]:
    """The decompressed bytes of a file, text as UTF-8, and the function that reads them."""
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
            stream, read = _recognise(expanded, inner, path)
            # pyarrow reads a table from its end, and decompressors seek only forwards
            yield (_buffered(_read_all(stream, path)) if read is _read_columns else stream), read


def _recognise(stream: io.BufferedReader, suffix: str, path: Path) -> tuple[io.BufferedReader, "_Reader"]:
    begin = stream.peek(8)[:8]
    _refuse(begin, suffix, path)
    if any(begin.startswith(magics) for magics in _TABLES.values()):
        return stream, _read_columns
    if begin and suffix in _TABLES:
        raise VocabtrimError(f"{path} is not {suffix} data, whatever its name says: get it again, or rename it")
    return _as_utf8(stream, path), _READERS.get(suffix, _read_text)


def _refuse(begin: bytes, suffix: str, path: Path) -> None:
    for magic, suffixes, what, how in _REFUSED:
        if begin.startswith(magic) or (begin and suffix in suffixes):
            raise VocabtrimError(f"{path} is {what}, which is not read: {how}")


def _as_utf8(stream: io.BufferedReader, path: Path) -> io.BufferedReader:
    """The stream behind a byte-order mark, converted where the mark says UTF-16 or UTF-32."""
    begin = stream.peek(4)[:4]
    if begin.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
        return stream
    encoding = next((encoding for mark, encoding in _BYTE_ORDER_MARKS if begin.startswith(mark)), None)
    if encoding is None:
        return stream
    try:
        text = _read_all(stream, path).decode(encoding)
    except UnicodeDecodeError as error:
        raise VocabtrimError(f"{path} is not {encoding.upper()} as its first bytes say: convert it to UTF-8") from error
    return _buffered(text.encode("utf-8", "replace"))


def _buffered(data: bytes) -> io.BufferedReader:
    return io.BufferedReader(cast(io.RawIOBase, io.BytesIO(data)))


def _read_all(stream: io.BufferedReader, path: Path) -> bytes:
    data = stream.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise VocabtrimError(f"{path} holds more than {MAX_FILE >> 20} MiB: split it, or write it as .jsonl")
    return data


def _decode(data: bytes, where: str) -> str:
    """UTF-8 text. Another encoding cannot be told with certainty, so it is refused."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise VocabtrimError(
            f"{where} is not UTF-8 text (byte {error.start}): convert it (iconv -f latin1 -t utf-8), or leave it out"
        ) from error
    if "\0" in text:
        raise VocabtrimError(f"{where} is not text, it holds NUL bytes: convert it to UTF-8, or leave it out")
    return text


def _read_text(stream: io.BufferedReader, path: Path) -> Iterator[tuple[str, object]]:
    text = _decode(_read_all(stream, path), str(path))
    first_line = text.lstrip().partition("\n")[0]
    if path.suffix.lower() in ("", ".txt") and first_line.startswith("{") and _is_json(first_line):
        raise VocabtrimError(f"{path} holds JSON lines, and its name says that it is text: rename it to .jsonl")
    yield str(path), {"text": text}


def _read_json_lines(stream: io.BufferedReader, path: Path) -> Iterator[tuple[str, object]]:
    # Lines end at "\n" alone: JSON strings may hold U+2028, which ends a line elsewhere.
    for number in count(1):
        line = stream.readline(MAX_LINE + 1)
        if not line:
            return
        where = f"{path}, line {number}"
        if len(line) > MAX_LINE:
            raise VocabtrimError(f"{where} is longer than {MAX_LINE >> 20} MiB: split or remove it")
        if (text := _decode(line, where)).strip():
            yield from _listed(_parse(text, where), where, where)


def _read_json(stream: io.BufferedReader, path: Path) -> Iterator[tuple[str, object]]:
    data = _read_all(stream, path)
    text = _decode(data, str(path))
    if not text.strip():
        return
    try:
        records = _parse(text, str(path))
    except VocabtrimError:
        first_line = text.strip().partition("\n")[0]
        if not _is_json(first_line):
            raise
        yield from _read_json_lines(_buffered(data), path)
        return
    yield from _listed(records, f"{path}, record 1", str(path))


def _listed(value: object, where: str, container: str) -> Iterator[tuple[str, object]]:
    """The records of a JSON value: its items where it is a list of records, otherwise itself."""
    if not isinstance(value, list) or _is_conversation(value) or (where == container and not _holds_objects(value)):
        yield where, value
        return
    for number, record in enumerate(value, 1):
        yield f"{container}, record {number}", record


def _is_conversation(records: list[object]) -> bool:
    """Whether a list holds the messages of one conversation, in OpenAI's form or ShareGPT's, and no records."""
    return bool(records) and all(isinstance(each, dict) and ("role" in each or "from" in each) for each in records)


def _holds_objects(values: list[object]) -> bool:
    return bool(values) and all(isinstance(each, dict) for each in values)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f" (at line {error.lineno})" if isinstance(error, json.JSONDecodeError) and error.lineno > 1 else ""
        raise VocabtrimError(f"{where} is not valid JSON{place}: mend or remove it") from error


def _read_table(stream: io.BufferedReader, path: Path) -> Iterator[tuple[str, object]]:
    text = _decode(_read_all(stream, path), str(path))
    header = text.partition("\n")[0]
    delimiter = max(",", ";", "\t", key=header.count)
    if delimiter not in header:
        delimiter = _NO_DELIMITER  # one column, whose text may hold commas
    before = csv.field_size_limit(MAX_LINE)  # 128 KiB by default, for the whole process
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or ()]
        for row in rows:
            if None in row:
                raise VocabtrimError(
                    f"{path}, line {rows.line_num} has more cells than the header: put text that holds {delimiter!r} "
                    "in double quotes"
                )
            cells = {name: value for name, value in row.items() if isinstance(name, str)}
            yield f"{path}, line {rows.line_num}", _cells(cells)
    except csv.Error as error:
        raise VocabtrimError(f"{path} is not a table of {path.suffix} ({error}): mend it, or write .jsonl") from error
    finally:
        csv.field_size_limit(before)


def _read_columns(stream: io.BufferedReader, path: Path) -> Iterator[tuple[str, object]]:
    for where, row in read_table(stream, path):
        yield where, _cells(row)


def _cells(row: Mapping[str, object]) -> dict[str, object]:
    """A table's row with None for empty cells; a conversation may stand in its cell as JSON."""

    def cell(column: str, value: object) -> object:
        is_list = column in _LISTS and isinstance(value, str) and value.lstrip()[:1] == "[" and _is_json(value)
        return json.loads(cast(str, value)) if is_list else None if value == "" else value

    return {column: cell(column, value) for column, value in row.items()}


_Reader = Callable[[io.BufferedReader, Path], Iterator[tuple[str, object]]]
_READERS: Mapping[str, _Reader] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
}
