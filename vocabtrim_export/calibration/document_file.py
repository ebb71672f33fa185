"""Documents, in memory while they are few, and in a temporary file once they are many."""

import json
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import overload

import numpy as np
from numpy.typing import NDArray

from vocabtrim_export.calibration.document import Document, Message

IN_MEMORY = 8 << 20  # characters of text


class DocumentFile(Sequence[Document]):
    """Documents in a temporary file, which is removed with the object or the process. In memory are 16 bytes of each.

    Args:
        documents: The documents, which are read once.
    """

    def __init__(self, documents: Iterable[Document]) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the object
        ends, lengths = array("q", [0]), array("q")
        for document in documents:
            prompt = [(message.role, message.content) for message in document.prompt]
            fields = (document.text, prompt, document.where, document.parts, document.answers)
            self._file.write(json.dumps(fields).encode())
            ends.append(self._file.tell())
            lengths.append(document.prompt_length)
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
        self._file.seek(begin)
        text, prompt, where, parts, answers = json.loads(self._file.read(end - begin))
        return Document(text, tuple(Message(*each) for each in prompt), where, tuple(parts), tuple(answers))


def kept(documents: Iterable[Document]) -> Sequence[Document]:
    """Keep documents for random access.

    Args:
        documents: The documents, which are read once.

    Returns:
        A tuple of them, or a `DocumentFile` where they have more than `IN_MEMORY` characters.
    """
    source, first, size = iter(documents), list[Document](), 0
    while size <= IN_MEMORY:
        batch = list(islice(source, 64))
        if not batch:
            return tuple(first)
        first += batch
        size += sum(len(document.text) for document in batch)
    return DocumentFile(chain(first, source))


def prompt_lengths(documents: Sequence[Document]) -> NDArray[np.int64]:
    """Returns int64[documents]: the characters of what a model is asked to continue in each."""
    if isinstance(documents, DocumentFile):
        return documents.prompt_lengths
    return np.array([document.prompt_length for document in documents], np.int64)
