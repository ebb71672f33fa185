"""Tokenizers that transformers converts from a sentencepiece model: they have to split text as that model does."""

import base64
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engines.errors import VocabtrimError
from vocabtrim_export.sources.config import first_line

_SPACE = "\u2581"
_UNIGRAM = 1  # model_type of a sentencepiece model
# Words, spaces, numbers and other scripts. Each piece is a text of its own; a vocabulary lacks what it does not know.
_PROBES = (
    "Hello world",
    "The quick brown fox jumps over the lazy dog, didn't it?",
    "two  spaces   three",
    "12345 3.14 1,000",
    "a\n\nb\tc",
    "na\u00efve caf\u00e9",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440",
    "def f(x):\n    return x  # c",
)
_LEGACY_PROBES = (" a space first",)  # which gets a second one, but not in tokenizers that state legacy: false
# The classes that put the BOS before a text by default: LLaMATokenizer is an old name, and transformers reads models
# such as Mistral's by a class of no family.
_ADDS_BOS = {"LlamaTokenizer", "LLaMATokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "TokenizersBackend"}


def follow_sentencepiece(spec: str, where: str, tokenizer: Any) -> None:
    """Make a tokenizer that was converted from a sentencepiece model split text as that model does.

    transformers' conversion drops the model's space in front of a text for some architectures, its normalisation for
    others, and takes a Unigram model for BPE where the tokenizer's class is Llama's. Where tokenizer_config.json does
    not state `add_bos_token`, transformers 5 drops the BOS too. A tokenizer that has a `tokenizer.json` is left as it
    is.

    Args:
        spec: MODEL as the user gave it.
        where: Its directory.
        tokenizer: transformers' fast tokenizer; changed in place.

    Raises:
        VocabtrimError: The tokenizer splits text in another way, and cannot be mended.
    """
    file = Path(getattr(tokenizer, "vocab_file", None) or "")
    if (Path(where) / "tokenizer.json").is_file() or not file.is_file() or (proto := _read(file)) is None:
        return
    _add_default_bos(Path(where), tokenizer)
    processor = _processor(spec, file)
    is_legacy = tokenizer.init_kwargs.get("legacy") is not False
    probes = (*_PROBES, *_LEGACY_PROBES) if is_legacy else _PROBES
    if _splits_alike(tokenizer.backend_tokenizer, processor, probes):
        return
    vocab = tokenizer.get_vocab()
    if all(vocab.get(piece.piece) == number for number, piece in enumerate(proto.pieces)):
        rebuilt = _rebuilt(tokenizer.backend_tokenizer, proto, is_legacy=is_legacy)
        if _splits_alike(rebuilt, processor, probes):
            tokenizer._tokenizer = rebuilt
            return
    raise VocabtrimError(
        f"{spec} has no tokenizer.json, and what transformers makes of its {file.name} splits text in another way than "
        "sentencepiece: put the tokenizer.json of the model's release there"
    )


def _add_default_bos(where: Path, tokenizer: Any) -> None:
    """Put the BOS before a text where tokenizer_config.json leaves that to a class whose default it is."""
    config = where / "tokenizer_config.json"
    stated = (json.loads(config.read_bytes()).get("tokenizer_class") if config.is_file() else None) or "LlamaTokenizer"
    if "add_bos_token" not in tokenizer.init_kwargs and stated.removesuffix("Fast") in _ADDS_BOS:
        tokenizer.add_bos_token = True  # transformers takes it back where there is no BOS


def _read(file: Path) -> Any:
    """Returns the content of a sentencepiece model; None for a file of another kind, such as tiktoken's."""
    messages: Any = import_module("google.protobuf.message")
    kinds: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    proto = kinds.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except messages.DecodeError:
        return None
    return proto if len(proto.pieces) else None


def _processor(spec: str, file: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(file))
    except Exception as error:  # which class depends on its release
        raise VocabtrimError(
            f"{spec} has no tokenizer.json, and sentencepiece cannot open its {file.name} ({first_line(error)}): "
            "put the tokenizer.json of the model's release there"
        ) from error


def _splits_alike(backend: Tokenizer, processor: Any, probes: Sequence[str]) -> bool:
    """Returns whether both split the probes into the same pieces; texts with unknown characters are left out."""
    for probe in probes:
        ids = processor.encode(probe)
        pieces = [processor.id_to_piece(number) for number in ids]
        if processor.unk_id() not in ids and backend.encode(probe, add_special_tokens=False).tokens != pieces:
            return False
    return True


def _rebuilt(backend: Tokenizer, proto: Any, *, is_legacy: bool) -> Tokenizer:
    """Returns a tokenizer with the added tokens of `backend` that computes what the sentencepiece model states.

    Args:
        backend: The converted tokenizer.
        proto: The sentencepiece model.
        is_legacy: Every text between special tokens begins with a space, as in Llama 2; otherwise the first one alone.
    """
    stated = json.loads(backend.to_str())
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    has_bytes = bool(trainer.byte_fallback)
    if trainer.model_type == _UNIGRAM:
        pieces = [(piece.piece, piece.score) for piece in proto.pieces]
        stated["model"] = {"type": "Unigram", "unk_id": trainer.unk_id, "vocab": pieces, "byte_fallback": has_bytes}
    prefix = bool(normalizer.add_dummy_prefix)
    stated["normalizer"] = {"type": "Sequence", "normalizers": _normalizers(normalizer, prefix and is_legacy)}
    stated["pre_tokenizer"] = None
    if prefix and not is_legacy:
        scheme = {"prepend_scheme": "first", "split": False}
        stated["pre_tokenizer"] = {"type": "Metaspace", "replacement": _SPACE, **scheme}
    decoders: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    stated["decoder"] = {"type": "Sequence", "decoders": decoders}
    return Tokenizer.from_str(json.dumps(stated))


def _normalizers(normalizer: Any, prepends: bool) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if normalizer.precompiled_charsmap:
        table = base64.b64encode(normalizer.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": table})
    if normalizer.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if prepends:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
