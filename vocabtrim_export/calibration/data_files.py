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

# The longest line of JSONL and the largest file that is read as a whole, in bytes: longer ones were not meant as one.
MAX_LINE, MAX_FILE = 64 << 20, 1 << 30
_LISTS = ("messages", "conversations", "conversation", "turns", "prompt")  # a table's cell holds these as JSON
_OPENERS: Mapping[str, tuple[bytes, Callable[[BinaryIO], Any]]] = {
    ".gz": (b"\x1f\x8b", gzip.open),
    ".bz2": (b"BZh", bz2.open),
    ".xz": (b"\xfd7zXZ\0", lzma.open),
}
# Formats that are recognised by how they begin or by their names, to be refused: what they are, and what to do.
_REFUSED: tuple[tuple[bytes, tuple[str, ...], str, str], ...] = (
    (b"\x28\xb5\x2f\xfd", (".zst",), "compressed with zstd", "decompress it first (zstd -d)"),
    (
        b"PAR1",
        (".parquet",),
        "a Parquet table",
        "convert it to .jsonl (pandas.read_parquet, then to_json)",
    ),
    (b"ARROW1", (".arrow", ".feather"), "an Arrow table", "convert it to .jsonl"),
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
    any other file is one text, `{"text": …}`. Each may be compressed (.gz, .bz2, .xz). UTF-8, or UTF-16 and UTF-32
    with a byte-order mark.
    Raises `VocabtrimError` naming the file, and the line or record, that cannot be read.
    """
    try:
        with _open(path) as (stream, suffix):
            yield from _READERS.get(suffix, _read_text)(stream, path)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise VocabtrimError(f"{path} is damaged, it cannot be decompressed ({error}): get it again") from error
    except OSError as error:
        raise VocabtrimError(f"cannot read {path}: {error.strerror or error}") from error


@contextmanager
def _open(path: Path) -> Iterator[tuple[io.BufferedReader, str]]:
    """The decompressed bytes of a file as UTF-8, and the suffix that says what they hold."""
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        begin = file.peek(8)[:8]
        _refuse(begin, suffix, path)
        opener = next((opener for magic, opener in _OPENERS.values() if begin.startswith(magic)), None)
        if opener is None:
            if begin and suffix in _OPENERS:
                raise VocabtrimError(f"{path} is not {suffix} data, whatever its name says: rename or decompress it")
            yield _as_utf8(file, path), suffix
            return
        inner = Path(path.stem).suffix.lower() if suffix in _OPENERS else suffix
        with io.BufferedReader(opener(file)) as expanded:
            _refuse(expanded.peek(8)[:8], inner, path)
            yield _as_utf8(expanded, path), inner


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
    return io.BufferedReader(cast(io.RawIOBase, io.BytesIO(text.encode("utf-8", "replace"))))


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
    yield str(path), {"text": _decode(_read_all(stream, path), str(path))}


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
            yield where, _parse(text, where)


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
        yield from _read_json_lines(io.BufferedReader(cast(io.RawIOBase, io.BytesIO(data))), path)
        return
    listed = records if isinstance(records, list) and not _is_conversation(records) else [records]
    for number, record in enumerate(listed, 1):
        yield f"{path}, record {number}", record


def _is_conversation(records: list[object]) -> bool:
    """Whether a list holds the messages of one conversation, in OpenAI's form or ShareGPT's, and no records."""
    return bool(records) and all(isinstance(each, dict) and ("role" in each or "from" in each) for each in records)


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
    before = csv.field_size_limit(MAX_LINE)  # 128 KiB by default, for the whole process
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        for row in rows:
            cells = {name: value for name, value in row.items() if isinstance(name, str) and value}
            yield f"{path}, line {rows.line_num}", {name: _cell(name, value) for name, value in cells.items()}
    except csv.Error as error:
        raise VocabtrimError(f"{path} is not a table of {path.suffix} ({error}): mend it, or write .jsonl") from error
    finally:
        csv.field_size_limit(before)


def _cell(column: str, value: str) -> object:
    return json.loads(value) if column in _LISTS and value.lstrip()[:1] == "[" and _is_json(value) else value


_READERS: Mapping[str, Callable[[io.BufferedReader, Path], Iterator[tuple[str, object]]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
}
