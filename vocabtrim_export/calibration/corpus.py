"""The text that calibration starts from: files and directories read into documents."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from engines.errors import VocabtrimError

# A long text becomes several documents of this many characters: each is a prompt of its own, and a part of them can
# be held out even where the corpus is a single file.
MIN_PIECE, MAX_PIECE = 1000, 2000
# A line of JSONL, and a file that is read as a whole, in bytes: what is longer was not written as one.
MAX_LINE, MAX_FILE = 64 << 20, 4 << 30
RECORD_FIELDS = ("messages", "conversations", "turns", "prompt", "text")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "developer": "system"}


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat; `role` is "system", "user", "assistant", or what the file says for other ones."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """One unit of calibration.

    text: all of its text, every turn of a conversation included; this is what the source "text" counts.
    prompt: what a model is asked to continue: at most one system message, then one user message.
        A conversation's is its first user turn with the system text before it; later turns are not prompts.
        Empty for raw text, where the model continues `text` itself.
    """

    text: str
    prompt: tuple[Message, ...] = ()

    @property
    def prompt_length(self) -> int:
        """Characters of what a model is asked to continue."""
        return sum(len(message.content) for message in self.prompt) or len(self.text)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents in a fixed order. `digest` is sha256 over their content, wherever they lay; `source` names them."""

    documents: tuple[Document, ...]
    digest: str
    source: str

    @classmethod
    def of(cls, documents: Sequence[Document], source: str) -> "Corpus":
        sha = hashlib.sha256()
        for document in documents:
            sha.update(json.dumps(asdict(document), sort_keys=True).encode() + b"\n")
        return cls(tuple(documents), sha.hexdigest(), source)


def read_corpus(paths: Sequence[Path]) -> Corpus:
    """Read text files, `.jsonl` and `.json` records, and directories of them (recursively, sorted, no hidden files).

    A record has `messages` (role, content), ShareGPT `conversations` (from, value), `turns` (the user's), `prompt`
    or `text`; the first of these that it has is read. Records that are empty, or conversations in which no user
    speaks, are passed over; a file with nothing else is an error. Any other file is UTF-8 text.
    No paths: `builtin_corpus()`. Raises `VocabtrimError` naming the file, and the line or record, that is wrong.
    """
    if not paths:
        return builtin_corpus()
    files = list(dict.fromkeys(file for path in paths for file in _files(Path(path))))
    documents = [document for file in files for document in _read_file(file)]
    names = ", ".join(path.name or str(path) for path in map(Path, paths))
    return Corpus.of(documents, f"{names} ({len(documents)} documents)")


def builtin_corpus() -> Corpus:
    """The topics of Python's own help, which every Python has: a stand-in where no text was given."""
    from pydoc_data.topics import topics

    documents = [Document(piece) for name in sorted(topics) for piece in split_text(topics[name])]
    return Corpus.of(documents, "built-in (pydoc_data.topics)")


def split_text(text: str) -> Iterator[str]:
    """Cut `text` into pieces of at most `MAX_PIECE` characters, at a blank line, else a line's end, else a space."""
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > MAX_PIECE:
            ends = (text.rfind(mark, start + MIN_PIECE, start + MAX_PIECE) for mark in ("\n\n", "\n", " "))
            end = next((at for at in ends if at >= 0), start + MAX_PIECE)
        if piece := text[start:end].strip():
            yield piece
        start = end


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise VocabtrimError(f"calibration data not found: {path}")
    inside = sorted(file for file in path.rglob("*") if file.is_file())
    # An empty file (a package's `__init__.py`) says nothing wrong about a directory; one that was named does.
    files = [
        file
        for file in inside
        if file.stat().st_size and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise VocabtrimError(f"no calibration files in the directory {path}")
    return files


def _read_file(path: Path) -> list[Document]:
    try:
        if path.suffix == ".jsonl":
            records = list(_json_lines(path))
        else:
            text = _read_text(path)
            records = list(_json_list(path, text)) if path.suffix == ".json" else []
    except OSError as error:
        raise VocabtrimError(f"cannot read {path}: {error.strerror}") from error
    where = str(path)
    if path.suffix not in (".json", ".jsonl"):
        documents = [Document(piece) for piece in split_text(text)]
    else:
        documents = [document for place, record in records for document in _parse_record(record, place)]
        where = records[0][0] if records else where
    if not documents:
        raise VocabtrimError(f"{where}: no usable text for calibration: the file is empty, or its records are")
    return documents


def _read_text(path: Path) -> str:
    if path.stat().st_size > MAX_FILE:
        raise VocabtrimError(f"{path} is larger than {MAX_FILE >> 20} MiB: split it, or write it as .jsonl")
    try:
        return path.read_text("utf-8-sig")  # the BOM of Windows' editors is no text
    except UnicodeDecodeError as error:
        raise VocabtrimError(f"{path} is not UTF-8 text (byte {error.start}): convert it, or leave it out") from error


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    # Lines end at "\n" alone: JSON strings may hold U+2028, which ends a line elsewhere.
    with path.open("rb") as file:
        for number in count(1):
            line = file.readline(MAX_LINE + 1)
            if not line:
                return
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE:
                raise VocabtrimError(f"{where} is longer than {MAX_LINE >> 20} MiB: split or remove it")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise VocabtrimError(f"{where} is not UTF-8 text (byte {error.start}): convert it") from error
            if text.strip():
                yield where, _parse_json(text, where)


def _json_list(path: Path, text: str) -> Iterator[tuple[str, object]]:
    if not text.strip():
        return
    records = _parse_json(text, str(path))
    if not isinstance(records, list):
        raise VocabtrimError(f"{path} must hold a JSON list of records, not one {_kind(records)}: wrap it in [ ]")
    for number, record in enumerate(records, 1):
        yield f"{path}, record {number}", record


def _parse_json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f" (at line {error.lineno})" if isinstance(error, json.JSONDecodeError) and error.lineno > 1 else ""
        raise VocabtrimError(f"{where} is not valid JSON{place}: mend or remove it") from error


def _parse_record(record: object, where: str) -> Iterator[Document]:
    """The documents of one record: one, or several of a long `text`, or none where the record is empty."""
    if not isinstance(record, dict):
        raise VocabtrimError(f"{where}: expected an object with one of {', '.join(RECORD_FIELDS)}; got {_kind(record)}")
    field = next((name for name in RECORD_FIELDS if record.get(name) is not None), None)
    if field is None:
        raise VocabtrimError(f"{where}: a record needs one of the fields {', '.join(RECORD_FIELDS)}")
    value = record[field]
    if field == "text":
        yield from map(Document, split_text(_content(value, f"{where}, {field}")))
        return
    if field == "prompt" and isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise VocabtrimError(f"{where}: `{field}` must be a list, not {_kind(value)}")
    messages = [_message(item, f"{where}, {field}[{index}]") for index, item in enumerate(value)]
    if prompt := _first_prompt(messages):
        yield Document("\n\n".join(message.content for message in messages if message.content), prompt)


def _message(item: object, where: str) -> Message:
    """A message in OpenAI's form, in ShareGPT's, or a plain string, which is the user's."""
    if isinstance(item, str):
        return Message("user", _content(item, where))
    if not isinstance(item, Mapping):
        raise VocabtrimError(f"{where}: expected a message, got {_kind(item)}")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(role, str):
        raise VocabtrimError(f"{where}: a message needs `role` and `content` (or `from` and `value`)")
    # A tool call has no content.
    return Message(ROLES.get(role, role), "" if content is None else _content(content, where))


def _content(value: object, where: str) -> str:
    """A string, or the text parts of a list of content parts. Lone surrogates, which JSON can escape, become "?"."""
    if isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
        value = "".join(str(part.get("text", "")) for part in value if part.get("type") == "text")
    if not isinstance(value, str):
        raise VocabtrimError(f"{where}: expected text, got {_kind(value)}")
    return value.encode("utf-8", "replace").decode().strip()


def _first_prompt(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The first user message that says something, with the system text before it; empty where no user speaks."""
    for index, message in enumerate(messages):
        if message.role == "user" and message.content:
            system = "\n\n".join(before.content for before in messages[:index] if before.role == "system")
            return (Message("system", system), message) if system else (message,)
    return ()


def _kind(value: object) -> str:
    return {dict: "object", list: "list", str: "string", type(None): "null"}.get(type(value), type(value).__name__)
