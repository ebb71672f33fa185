"""The text that calibration starts from: files and directories read into documents."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.errors import VocabtrimError
from vocabtrim_export.calibration.data_files import read_records
from vocabtrim_export.calibration.document import Document, Skipped, split_text
from vocabtrim_export.calibration.records import parse_record


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents in a fixed order. `digest` is sha256 over their content, wherever they lay; `source` names them.

    skipped: the records of its files that have no known form.
    """

    documents: tuple[Document, ...]
    digest: str
    source: str
    skipped: tuple[Skipped, ...] = ()

    @classmethod
    def of(cls, documents: Sequence[Document], source: str, skipped: Sequence[Skipped] = ()) -> "Corpus":
        sha = hashlib.sha256()
        for document in documents:
            prompt = [{"role": message.role, "content": message.content} for message in document.prompt]
            said: dict[str, object] = {"text": document.text, "prompt": prompt}
            if document.answers:
                said["answers"] = document.answers
            sha.update(json.dumps(said, sort_keys=True).encode() + b"\n")
        return cls(tuple(documents), sha.hexdigest(), source, tuple(skipped))


def read_corpus(paths: Sequence[Path]) -> Corpus:
    """Read data files, and directories of them (recursively, sorted, no hidden files): see `read_records`.

    Records that are empty, or conversations in which no user speaks, are passed over; records of no known form are
    left out and named in `skipped`; a file with nothing else is an error. No paths: `builtin_corpus()`.
    Raises `VocabtrimError` naming the file, and the line or record, that is wrong.
    """
    if not paths:
        return builtin_corpus()
    files = list(dict.fromkeys(file for path in paths for file in _files(Path(path))))
    documents: list[Document] = []
    skipped: list[Skipped] = []
    for file in files:
        _read_file(file, documents, skipped)
    names = ", ".join(path.name or str(path) for path in map(Path, paths))
    return Corpus.of(documents, f"{names} ({len(documents)} documents)", skipped)


def builtin_corpus() -> Corpus:
    """The topics of Python's own help, which every Python has: a stand-in where no text was given."""
    from pydoc_data.topics import topics

    documents = [Document(piece) for name in sorted(topics) for piece in split_text(topics[name])]
    return Corpus.of(documents, "built-in (pydoc_data.topics)")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if re.match(r"\w+:/", str(path)):
        raise VocabtrimError(f"{path} is a URL, which is not fetched: download it and give the file")
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


def _read_file(path: Path, documents: list[Document], skipped: list[Skipped]) -> None:
    """Append the documents of one file, and what was left out. Raises `VocabtrimError` where nothing is usable."""
    before, first_reason, first_place = len(documents), "", str(path)
    for where, record in read_records(path):
        first_place = where if first_place == str(path) else first_place
        try:
            documents.extend(parse_record(record, where))
        except VocabtrimError as error:
            first_reason = first_reason or str(error)
            skipped.append(Skipped(where, str(error).removeprefix(f"{where}: ").removeprefix(f"{where}, ")))
    if len(documents) == before:
        raise VocabtrimError(
            first_reason or f"{first_place}: no usable text for calibration: the file is empty, or its records are"
        )
