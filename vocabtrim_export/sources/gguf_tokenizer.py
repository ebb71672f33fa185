"""The tokenizer of a `.gguf` file, with the same ids for a text as llama.cpp."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from engines.bundle.chat_template import DEFAULT
from engines.errors import VocabtrimError
from vocabtrim_export.sources.gguf_header import GgufHeader
from vocabtrim_export.sources.gguf_pre_tokenizers import BEGINS_WITH_BOS, IGNORES_MERGES, byte_level_splits

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type
_TEMPLATE = "tokenizer.chat_template"
_SPACE = "\u2581"
_END_NAMES = frozenset(  # tokens that llama.cpp takes for the end of a generation whatever else the file says
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    ]
)
_ENDS_A_MESSAGE_ONLY = frozenset(("<|return|>", "<|call|>")), frozenset(("<|calls|>", "<|flush|>"))
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # where a file of that kind names none


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """The tokenizer of a `.gguf` file.

    Attributes:
        tokenizer: The same class as transformers' own tokenizers.
        end_token_ids: Every id that ends a generation.
        notes: Notes for the user about how prompts are split.
    """

    tokenizer: PreTrainedTokenizerFast
    end_token_ids: tuple[int, ...]
    notes: tuple[str, ...]


def read_tokenizer(header: GgufHeader) -> GgufTokenizer:
    """Build the tokenizer of a file.

    Rows that converters call `[PADn]` have no token and are left out.

    Raises:
        VocabtrimError: The file has no tokenizer, or one of a kind that is not read.
    """
    table = _Table.of(header)
    build = _BUILDERS.get(table.kind)
    if build is None:
        raise VocabtrimError(
            f"{header.path} has a tokenizer of the kind {table.kind!r}, which is not read: give the original weights"
        )
    try:
        backend, note = build(table)
        backend.add_tokens(table.added_tokens())
    except VocabtrimError:
        raise
    except Exception as error:  # the library raises a bare Exception for merges of missing tokens
        raise VocabtrimError(f"{header.path} has a damaged tokenizer ({error}): fetch it again") from error
    if (bos := table.special("bos")) is not None and table.begins_with_bos:
        pieces = [(table.tokens[bos], bos)]
        backend.post_processor = TemplateProcessing(f"{table.tokens[bos]}:0 $A:0", special_tokens=pieces)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: table.special(key) for name, key in names.items()}
    arguments = {name: table.tokens[token_id] for name, token_id in ids.items() if token_id is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=_templates(header), **arguments)
    return GgufTokenizer(tokenizer, table.end_token_ids(), (f"{header.path} {note}",) if note else ())


def _templates(header: GgufHeader) -> str | dict[str, str] | None:
    """Returns the chat template of a file; where it has some with names of their own, all by their names."""
    named = {
        key.removeprefix(_TEMPLATE).removeprefix(".") or DEFAULT: value
        for key, value in header.metadata.items()
        if (key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")) and isinstance(value, str)
    }
    return named if named.keys() - {DEFAULT} else named.get(DEFAULT)


@dataclass(frozen=True, slots=True)
class _Table:
    """The fields `tokenizer.ggml.*`.

    Attributes:
        fields: The fields by name.
        kind: The kind of tokenizer.
        name: The model's name, in lower case.
        tokens: The tokens by id.
        types: The type of each token, see `_NORMAL` and its neighbours.
    """

    fields: dict[str, Any]
    kind: str
    name: str
    tokens: Sequence[str]
    types: Sequence[int]

    @classmethod
    def of(cls, header: GgufHeader) -> "_Table":
        start = "tokenizer.ggml."
        fields = {key.removeprefix(start): value for key, value in header.metadata.items() if key.startswith(start)}
        tokens, kind = fields.get("tokens"), fields.get("model")
        if not isinstance(tokens, list) or not isinstance(kind, str):
            raise VocabtrimError(f"{header.path} holds no tokenizer: give a file of the whole model")
        types = fields.get("token_type")
        listed = [_NORMAL] * len(tokens) if types is None else [int(kind) for kind in types]
        if len(listed) != len(tokens):
            raise VocabtrimError(f"{header.path} has {len(tokens)} tokens and types of {len(listed)}: fetch it again")
        return cls(fields, kind, str(header.metadata.get("general.name", "")).lower(), tokens, listed)

    @property
    def vocab(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens) if token != f"[PAD{number}]"}

    @property
    def merges(self) -> list[tuple[str, str]]:
        pairs = []
        for merge in self.fields.get("merges", ()):
            at = merge.find(" ", 1)
            pairs.append((merge[:at], merge[at + 1 :]))
        return pairs

    @property
    def begins_with_bos(self) -> bool:
        by_kind = self.kind in ("llama", "gemma4") or self.fields.get("pre") in BEGINS_WITH_BOS
        return by_kind if self.kind == "gemma4" else bool(self.fields.get("add_bos_token", by_kind))

    def special(self, name: str) -> int | None:
        """Returns the id of `bos`, `eos`, `eot` and the like; None where the file names none that exists."""
        default = _SENTENCEPIECE_IDS.get(name) if self.kind == "llama" else None
        number = self.fields.get(f"{name}_token_id", default)
        return number if isinstance(number, int) and 0 <= number < len(self.tokens) else None

    def ends(self, number: int) -> bool:
        """Returns whether the token is known to end a generation.

        HTML's </s> is an ordinary token in some vocabularies.
        """
        token = self.tokens[number]
        return token in _END_NAMES and (token != "</s>" or self.types[number] == _CONTROL)

    def end_token_ids(self) -> tuple[int, ...]:
        ids = {number for name in ("eos", "eot", "eom") if (number := self.special(name)) is not None}
        ids |= {number for number in range(len(self.tokens)) if self.ends(number)}
        names = {self.tokens[number] for number in ids}
        if any(others <= names for others in _ENDS_A_MESSAGE_ONLY):  # such a model goes on after <|end|>
            ids -= {number for number in ids if self.tokens[number] == "<|end|>"}
        return tuple(sorted(ids))

    def added_tokens(self) -> list[AddedToken]:
        """Returns the tokens that are found in a text before it is split. Phi-3's include the spaces after them."""
        strips = "phi-3" in self.name or "phi3" in self.name
        return [
            AddedToken(
                token,
                normalized=False,
                special=self.types[number] != _USER_DEFINED or self.ends(number),
                rstrip=strips and token not in ("<unk>", "<s>", "<|endoftext|>"),
            )
            for token, number in self.vocab.items()
            if self.types[number] in (_UNKNOWN, _CONTROL, _USER_DEFINED) or self.ends(number)
        ]


def _byte_level(table: _Table) -> tuple[Tokenizer, str | None]:
    pre = table.fields.get("pre")
    backend = Tokenizer(BPE(table.vocab, table.merges, ignore_merges=pre in IGNORES_MERGES))
    backend.pre_tokenizer, note = byte_level_splits(pre)
    backend.decoder = decoders.ByteLevel()
    return backend, note


def _sentencepiece(table: _Table) -> tuple[Tokenizer, str | None]:
    """Build a tokenizer of pieces with scores.

    The two neighbours that form the piece of the highest score merge first.
    """
    backend = _with_bytes(table, _merges_by_score(table))
    if table.fields.get("add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
        backend.decoder = decoders.Sequence([*_BYTE_DECODERS, decoders.Strip(" ", 1, 0)])
    return backend, None


def _gemma4(table: _Table) -> tuple[Tokenizer, str | None]:
    backend = _with_bytes(table, table.merges)
    backend.pre_tokenizer = Split(Regex(r"[^\n]+|\n+"), "isolated")
    return backend, None


_BYTE_DECODERS = (decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse())
_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _gemma4}


def _with_bytes(table: _Table, merges: list[tuple[str, str]]) -> Tokenizer:
    unknown = table.special("unknown")
    token = None if unknown is None else table.tokens[unknown]
    backend = Tokenizer(BPE(table.vocab, merges, byte_fallback=True, fuse_unk=True, unk_token=token))
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.decoder = decoders.Sequence(list(_BYTE_DECODERS))
    return backend


def _merges_by_score(table: _Table) -> list[tuple[str, str]]:
    """Returns every way to join two pieces to one, the joined pieces of the highest score first, then the earlier."""
    scores = table.fields.get("scores")
    if scores is None or len(scores) != len(table.tokens):
        raise VocabtrimError("its pieces have no scores")
    pieces = {
        token: (-float(scores[number]), number)
        for token, number in table.vocab.items()
        if table.types[number] in (_NORMAL, _UNUSED)
    }
    ways = [
        (rank, cut, token)
        for token, rank in pieces.items()
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    return [(token[:cut], token[cut:]) for _, cut, token in sorted(ways)]
