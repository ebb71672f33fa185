"""The text that calibration starts from: files and directories read into documents."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engines.errors import VocabtrimError
from vocabtrim_export.calibration.data_files import read_records
from vocabtrim_export.calibration.document import Document, Skipped, cut_text
from vocabtrim_export.calibration.document_file import kept
from vocabtrim_export.calibration.hub_data import is_hub_data, read_hub_data
from vocabtrim_export.calibration.records import parse_record

# What `save_to_disk` of `datasets` writes next to its Arrow files.
_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents in a fixed order.

    Attributes:
        documents: The documents; those of a large corpus are in a temporary file.
        digest: sha256 over their content; it does not depend on the paths of the files.
        source: The names of the files.
        skipped: The records of the files that have no known form.
    """

    documents: Sequence[Document]
    digest: str
    source: str
    skipped: tuple[Skipped, ...] = ()

    @classmethod
    def of(cls, documents: Iterable[Document], source: str, skipped: Sequence[Skipped] = ()) -> "Corpus":
        """Keep documents that are read once.

        Args:
            documents: The documents.
            source: The names of the files.
            skipped: Records that are left out; the sequence may grow while the documents are read.
        """
        places, digest = kept(documents)
        return cls(places, digest, source, tuple(skipped))


def read_corpus(paths: Sequence[Path]) -> Corpus:
    """Read data files, directories of them (recursively, sorted, no hidden files), and data sets of the hub.

    See `read_records` and `read_hub_data`. Records that are empty, and conversations without a user's message, are
    passed over. Records of an unknown form are left out and named in `skipped`; a file with nothing else is an error.

    Args:
        paths: The files, directories and data sets; none: `builtin_corpus()`.

    Raises:
        VocabtrimError: Names the file, and the line or record, that cannot be read.
    """
    if not paths:
        return builtin_corpus()
    files = list(dict.fromkeys(file for path in paths for file in _files(Path(path))))
    skipped: list[Skipped] = []
    names = ", ".join(path.name or str(path) for path in map(Path, paths))
    corpus = Corpus.of((document for file in files for document in _read_file(file, skipped)), names, skipped)
    return replace(corpus, source=f"{names} ({len(corpus.documents)} documents)")


def builtin_corpus() -> Corpus:
    """Returns the topics of Python's own help, which every Python has: a stand-in where no text was given."""
    from pydoc_data.topics import topics

    documents = [Document(piece) for name in sorted(topics) for piece in cut_text([topics[name]])]
    return Corpus.of(documents, "built-in (pydoc_data.topics)")


def _files(path: Path) -> list[Path]:
    if path.is_file() or is_hub_data(path):
        return [path]
    if re.match(r"\w+:/", str(path)):
        raise VocabtrimError(f"{path} is a URL, which is not fetched: download it and give the file")
    if not path.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise VocabtrimError(f"calibration data not found: {path} (a data set of the hub is hf://{path})")
    if not path.is_dir():
        if path.exists():
            raise VocabtrimError(f"{path} is no file or directory but a pipe or a device: write the data to a file")
        raise VocabtrimError(f"calibration data not found: {path}")
    inside = sorted(file for file in path.rglob("*") if file.is_file())
    # An empty file in a directory (a package's `__init__.py`) is no mistake; an empty file that was named is one.
    files = [
        file
        for file in inside
        if file.stat().st_size
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and not (file.name in _SAVED and (file.name == _SAVED[0] or any(file.parent.glob("*.arrow"))))
    ]
    if not files:
        raise VocabtrimError(f"no calibration files in the directory {path}")
    return files


def _read_file(path: Path, skipped: list[Skipped]) -> Iterator[Document]:
    """Yield the documents of one file, and add the records that are left out to `skipped`.

    Raises:
        VocabtrimError: Nothing in the file is usable.
    """
    is_empty, first_reason, first_place = True, "", str(path)
    for where, record in read_hub_data(path) if is_hub_data(path) else read_records(path):
        first_place = where if first_place == str(path) else first_place
        try:
            for document in parse_record(record, where):
                is_empty = False
                yield document
        except VocabtrimError as error:
            first_reason = first_reason or str(error)
            skipped.append(Skipped(where, str(error).removeprefix(f"{where}: ").removeprefix(f"{where}, ")))
    if is_empty:
        raise VocabtrimError(
            first_reason or f"{first_place}: no usable text for calibration: the file is empty, or its records are"
        )
