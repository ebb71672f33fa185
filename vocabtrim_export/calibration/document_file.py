"""Documents, in memory while they are few, and in a temporary file once they are many."""

import hashlib
import json
import marshal
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from json.encoder import encode_basestring_ascii
from typing import overload

import numpy as np
from numpy.typing import NDArray

from vocabtrim_export.calibration.document import Document, Message

IN_MEMORY = 8 << 20  # characters of text
_WRITTEN_AT_ONCE = 1 << 20  # bytes
_to_json = json.JSONEncoder(sort_keys=True).encode


class DocumentFile(Sequence[Document]):
    """Documents in a temporary file, which is removed with the object or the process. In memory are 16 bytes of each.

    Args:
        documents: The documents, which are read once.
    """

    def __init__(self, documents: Iterable[Document]) -> None:
        self._file = tempfile.TemporaryFile(buffering=_WRITTEN_AT_ONCE)  # noqa: SIM115 - lives as long as the object
        ends, lengths = array("q", [0]), array("q")
        end = 0
        for document in documents:
            end += self._file.write(_pack(document))
            ends.append(end)
            lengths.append(document.prompt_length)
        self._file.flush()
        self._ends: NDArray[np.int64] = np.array(ends, np.int64)
        self.prompt_lengths: NDArray[np.int64] = np.array(lengths, np.int64)

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Document, ...]: ...
    def __getitem__(self, index: int | slice) -> Document | tuple[Document, ...]:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        number = range(len(self))[index]
        begin, end = self._ends[number : number + 2].tolist()
        return _unpack(os.pread(self._file.fileno(), end - begin, begin))


def _pack(document: Document) -> bytes:
    """Returns a document in Python's own form, which is read several times as fast as JSON."""
    prompt = tuple((message.role, message.content) for message in document.prompt)
    return marshal.dumps((document.text, prompt, document.where, document.parts, document.answers))


def _unpack(data: bytes) -> Document:
    text, prompt, where, parts, answers = marshal.loads(data)
    return Document(text, tuple(Message(role, content) for role, content in prompt), where, parts, answers)


def kept(documents: Iterable[Document]) -> tuple[Sequence[Document], str]:
    """Keep documents for random access.

    Args:
        documents: The documents, which are read once.

    Returns:
        A tuple of them, or a `DocumentFile` where they have more than `IN_MEMORY` characters; and the sha256 over their
        content.
    """
    sha = hashlib.sha256()

    def digested() -> Iterator[Document]:
        for document in documents:
            sha.update(_content(document))
            yield document

    source, first, size = digested(), list[Document](), 0
    while size <= IN_MEMORY:
        batch = list(islice(source, 64))
        if not batch:
            return tuple(first), sha.hexdigest()
        first += batch
        size += sum(len(document.text) for document in batch)
    return DocumentFile(chain(first, source)), sha.hexdigest()


def _content(document: Document) -> bytes:
    """Returns what identifies a document, its place apart, as a line of JSON."""
    if not document.prompt and not document.answers:
        return f'{{"prompt": [], "text": {encode_basestring_ascii(document.text)}}}\n'.encode()
    prompt = [{"role": message.role, "content": message.content} for message in document.prompt]
    content: dict[str, object] = {"text": document.text, "prompt": prompt}
    if document.answers:
        content["answers"] = document.answers
    return _to_json(content).encode() + b"\n"


def prompt_lengths(documents: Sequence[Document]) -> NDArray[np.int64]:
    """Returns int64[documents]: the characters of what a model is asked to continue in each."""
    if isinstance(documents, DocumentFile):
        return documents.prompt_lengths
    return np.array([document.prompt_length for document in documents], np.int64)
