"""Text, JSON lines, JSON and CSV read record by record; of a large file only a part is in memory at a time."""

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, count
from pathlib import Path
from typing import IO, cast

from engines.errors import VocabtrimError
from vocabtrim_export.calibration.document import cut_text

# The longest line of JSONL or of a table, in bytes or characters, and the longest record of a JSON list.
MAX_LINE = 64 << 20
WHOLE_JSON = 8 << 20  # bytes: a larger .json file is read record by record
_CHUNK = 1 << 20
_TEXT_SUFFIXES = (".txt", ".log", ".gz", ".bz2", ".xz", ".zst")
_RECORD_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})
_NO_DELIMITER = "\x1f"  # stands in no text
_LISTS = ("messages", "conversations", "conversation", "turns", "prompt")  # a table's cell holds these as JSON

Records = Iterator[tuple[str, object]]


def read_text(stream: IO[bytes], path: Path) -> Records:
    """Yield the pieces of one text, each as a record `{"text": …}`.

    Raises:
        VocabtrimError: The text is not UTF-8, or the file holds JSON lines.
    """
    chunks = _decoded(stream, str(path))
    first = next(chunks, "")
    first_line = first.lstrip().partition("\n")[0]
    if _may_be_records(path) and first_line.startswith("{") and _is_json(first_line):
        raise VocabtrimError(f"{path} holds JSON lines, and its name says that it is text: rename it to .jsonl")
    for piece in cut_text(chain([first], chunks)):
        yield str(path), {"text": piece}


def _may_be_records(path: Path) -> bool:
    """Returns whether a file that is read as text may have records: log.txt, dump.gz, data.jsonl.1, data.json.bak."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return not suffixes or suffixes[-1] in _TEXT_SUFFIXES or not _RECORD_SUFFIXES.isdisjoint(suffixes)


def read_json_lines(stream: IO[bytes], path: Path) -> Records:
    """Yield the JSON values of lines, and of a line that holds a list of objects these.

    Raises:
        VocabtrimError: A line is no JSON, or too long.
    """
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


def read_json(stream: IO[bytes], path: Path) -> Records:
    """Yield the items of a JSON list of records, or the one record that a file holds; or of JSON lines.

    Raises:
        VocabtrimError: The file is none of these, is not UTF-8, or has a record that is too long.
    """
    data = stream.read(WHOLE_JSON + 1)
    whole = cast(IO[bytes], _Joined(data, stream))
    if len(data) > WHOLE_JSON:
        is_list = data.lstrip()[:1] == b"["
        yield from _items(_decoded(whole, str(path)), path) if is_list else read_json_lines(whole, path)
        return
    text = _decode(data, str(path))
    if not text.strip():
        return
    try:
        records = _parse(text, str(path))
    except VocabtrimError:
        if not _is_json(text.strip().partition("\n")[0]):
            raise
        yield from read_json_lines(whole, path)
        return
    yield from _listed(records, f"{path}, record 1", str(path))


def read_table(stream: IO[bytes], path: Path) -> Records:
    """Yield the rows below the header of a table whose cells are parted by commas, semicolons or tabs.

    Raises:
        VocabtrimError: The file is no such table.
    """
    lines = _lines(_decoded(stream, str(path)), path)
    header = next(lines, "")
    delimiter = max(",", ";", "\t", key=header.count)
    if delimiter not in header:
        delimiter = _NO_DELIMITER  # one column, whose text may hold commas
    before = csv.field_size_limit(MAX_LINE)  # 128 KiB by default, for the whole process
    try:
        rows = csv.DictReader(chain([header], lines), delimiter=delimiter, strict=True)
        rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or ()]
        for row in rows:
            if None in row:
                raise VocabtrimError(
                    f"{path}, line {rows.line_num} has more cells than the header: put text that holds {delimiter!r} "
                    "in double quotes"
                )
            cells = {name: value for name, value in row.items() if isinstance(name, str)}
            yield f"{path}, line {rows.line_num}", table_cells(cells)
    except csv.Error as error:
        raise VocabtrimError(
            f"{path} is not a table of {path.suffix} ({error}, at line {rows.line_num}): a cell that begins with a "
            "double quote has to end with one, with those inside of it doubled; correct it, or use .jsonl"
        ) from error
    finally:
        csv.field_size_limit(before)


def table_cells(cells: Mapping[str, object]) -> dict[str, object]:
    """Returns a table's row with None for empty cells; a conversation may stand in its cell as JSON."""

    def cell(column: str, value: object) -> object:
        is_list = column in _LISTS and isinstance(value, str) and value.lstrip()[:1] == "[" and _is_json(value)
        return json.loads(cast(str, value)) if is_list else None if value == "" else value

    return {column: cell(column, value) for column, value in cells.items()}


class _Joined(io.RawIOBase):
    """Bytes that were read from a stream, and what follows them there."""

    def __init__(self, data: bytes, rest: IO[bytes]) -> None:
        self.parts = io.BytesIO(data), rest

    def read(self, size: int = -1) -> bytes:
        return self.parts[0].read(size) or self.parts[1].read(size)

    def readline(self, size: int | None = -1) -> bytes:
        line = self.parts[0].readline(-1 if size is None else size)
        return line if line.endswith(b"\n") else line + self.parts[1].readline(-1 if size is None else size)


def _decoded(stream: IO[bytes], where: str) -> Iterator[str]:
    """Yield a UTF-8 stream's text in parts. Another encoding cannot be told with certainty, so it is refused."""
    decoder, place = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        data = stream.read(_CHUNK)
        begin = place - len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise _not_utf8(where, begin + error.start, error) from error
        _check_no_nul(text, where)
        place += len(data)
        if text:
            yield text
        if not data:
            return


def _decode(data: bytes, where: str) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error.start, error) from error
    _check_no_nul(text, where)
    return text


def _not_utf8(where: str, place: int, error: UnicodeDecodeError) -> VocabtrimError:
    cut = "get it again if it was cut there, " if error.reason == "unexpected end of data" else ""
    return VocabtrimError(
        f"{where} is not UTF-8 text (byte {place}): {cut}convert it (iconv -f latin1 -t utf-8), or leave it out"
    )


def _check_no_nul(text: str, where: str) -> None:
    if "\0" in text:
        raise VocabtrimError(f"{where} is not text, it holds NUL bytes: convert it to UTF-8, or leave it out")


def _lines(chunks: Iterable[str], path: Path) -> Iterator[str]:
    r"""Yield lines with their ends, "\n", "\r\n" or "\r"."""
    rest = ""
    for chunk in chunks:
        *whole, rest = io.StringIO(rest + chunk, newline="")  # the last one may go on in the next chunk
        yield from whole
        if len(rest) > MAX_LINE:
            raise VocabtrimError(f"{path} has a line that is longer than {MAX_LINE >> 20} MiB: split or remove it")
    if rest:
        yield rest


def _items(chunks: Iterator[str], path: Path) -> Records:
    """Yield the items of a JSON list."""
    decoder, number = json.JSONDecoder(), 1
    text = next(chunks).lstrip()[1:]
    while True:
        text = text.lstrip(" \t\r\n,")
        if text.startswith("]"):
            return
        where = f"{path}, record {number}"
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError) as error:  # the rest of it may be in the next chunk
            more = next(chunks, "")
            if not more or len(text) > MAX_LINE:
                raise VocabtrimError(f"{where} is not valid JSON: correct or remove it") from error
            text += more
            continue
        yield where, value
        text, number = text[end:], number + 1


def _listed(value: object, where: str, container: str) -> Records:
    """Yield the records of a JSON value, which are the items of a list of records, otherwise the value itself."""
    if not isinstance(value, list) or _is_conversation(value) or (where == container and not _holds_objects(value)):
        yield where, value
        return
    for number, record in enumerate(value, 1):
        yield f"{container}, record {number}", record


def _is_conversation(records: list[object]) -> bool:
    """Returns whether a list holds the messages of one conversation, in OpenAI's form or ShareGPT's, and no records."""
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
        raise VocabtrimError(f"{where} is not valid JSON{place}: correct or remove it") from error
