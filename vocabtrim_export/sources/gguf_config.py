"""transformers' configuration of a `.gguf` file, without its slow walk over the vocabulary."""

import struct
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from vocabtrim_export.sources.gguf_header import GgufHeader

_F32 = 0
_VOCABULARY = "tokenizer.ggml."


def read_config(header: GgufHeader) -> Any:
    """Returns transformers' configuration of the model in the file.

    transformers' reader creates Python objects of each token, merge and score, twice, which takes most of a minute for
    150,000 tokens. It therefore reads a file with the same metadata, but for those lists, and empty tensors of the same
    names, by which some architectures are told apart.
    """
    with tempfile.TemporaryDirectory() as directory:
        brief = Path(directory) / header.path.name
        brief.write_bytes(_without_vocabulary(header))
        config = AutoConfig.from_pretrained(directory, gguf_file=brief.name)
    stated = header.hyperparameters().get("vocab_size")  # not in transformers' tables of all architectures
    config.vocab_size = int(stated or len(header.metadata["tokenizer.ggml.tokens"]))
    return config


def _without_vocabulary(header: GgufHeader) -> bytes:
    def is_list(key: str) -> bool:
        return (
            key.startswith(_VOCABULARY)
            and hasattr(header.metadata[key], "__len__")
            and not isinstance(header.metadata[key], str)
        )

    kept = [place for key, place in header.entries.items() if not is_list(key)]
    data = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(header.tensors), len(kept)))
    with header.path.open("rb") as file:
        for place in kept:
            file.seek(place.start)
            data += file.read(place.stop - place.start)
    for name in header.tensors:
        encoded = name.encode()
        data += struct.pack("<Q", len(encoded)) + encoded + struct.pack("<IQIQ", 1, 1, _F32, 0)
    alignment = int(header.metadata.get("general.alignment", 32))
    return bytes(data + bytes(-len(data) % alignment + 32))
