"""`Tokenizer`: text ↔ token ids from a bundle's own files, with the chat template, without transformers."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers.decoders import DecodeStream

from engines.bundle.chat_template import DEFAULT, ChatOptions, ChatTemplates, named_templates
from engines.errors import VocabtrimError

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
_LONG = 1 << 15  # characters: a few hundredths of a second
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_LOST = "\ufffd"  # in the place of bytes that are no character by themselves
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # bytes that a byte-level vocabulary spells so
_OTHERS = sorted(set(range(256)) - set(_PRINTED))  # it spells these with the characters from 256 on
_BYTES = {chr(byte): byte for byte in _PRINTED} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
# What transformers' `clean_up_tokenization` replaces, in its order, and the characters that any of it may go on after.
_CLEANED = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")),
    *((" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)
_OPEN = " 'nvr"
TEMPLATES_NAME = "additional_chat_templates"  # a directory of templates with other names than "default"


def tokenizer_digest(tokenizer: tokenizers.Tokenizer) -> str:
    """Returns the sha256, in hex, of the token → id table with its added tokens, as JSON sorted by token.

    Nothing else is hashed: exports of one vocabulary with different normalisers or templates have one digest.
    """
    table = tokenizer.get_vocab(with_added_tokens=True)
    return hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Tokenizer:
    """Encodes prompts and decodes generations as transformers' `PreTrainedTokenizerFast` does on the same files."""

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], chat_template: Any) -> None:
        """Make a tokenizer.

        Args:
            backend: The tokenizer to take over; its truncation and padding are switched off.
            config: The content of `tokenizer_config.json`.
            chat_template: The templates, as `named_templates` reads them.

        Raises:
            VocabtrimError: A template does not parse.
        """
        backend.no_truncation()  # settings saved in training must not cut or pad a prompt
        backend.no_padding()
        backend.encode_special_tokens = config.get("split_special_tokens") is True
        self.backend = backend
        is_bpe = isinstance(backend.model, tokenizers.models.BPE)  # which transformers does not clean up
        self.cleans_up = config.get("clean_up_tokenization_spaces") is True and not is_bpe
        self.chat = ChatTemplates(named_templates(chat_template), _special_tokens(config))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a directory's `tokenizer.json`, `tokenizer_config.json` and chat templates.

        Templates in files of their own (`chat_template.jinja`, `additional_chat_templates/NAME.jinja`) replace those
        in `tokenizer_config.json`, as in transformers.

        Raises:
            VocabtrimError: A file is missing or malformed.
        """
        root = Path(path)
        if not (root / TOKENIZER_NAME).is_file():
            raise VocabtrimError(f"{root} has no {TOKENIZER_NAME}: export the bundle again from a model with one")
        try:
            backend = tokenizers.Tokenizer.from_file(str(root / TOKENIZER_NAME))
        except Exception as error:  # the library raises bare Exception
            raise VocabtrimError(f"{root / TOKENIZER_NAME} is not a tokenizer ({error}): export again") from error
        try:
            config = json.loads((root / CONFIG_NAME).read_text("utf-8")) if (root / CONFIG_NAME).is_file() else {}
        except ValueError as error:
            raise VocabtrimError(f"{root / CONFIG_NAME} is not JSON ({error}): export the bundle again") from error
        if not isinstance(config, dict):
            raise VocabtrimError(f"{root / CONFIG_NAME} holds no JSON object: export the bundle again")
        return cls(backend, config, _template_files(root) or config.get("chat_template"))

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat.names)

    @property
    def digest(self) -> str:
        """See `tokenizer_digest`."""
        return tokenizer_digest(self.backend)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of plain text, with the special tokens that the tokenizer puts around it (often a BOS).

        Raises:
            VocabtrimError: The tokenizer has no tokens for some of the text.
        """
        return self._ids(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Any], options: ChatOptions | None = None) -> list[int]:
        """Returns the ids of a conversation up to where the assistant's answer begins; see `ChatTemplates.render`.

        Raises:
            VocabtrimError: There is no template, or it refuses the messages.
        """
        text = self.chat.render(messages, options or ChatOptions())
        return self._ids(text, add_special_tokens=False)  # the template wrote them

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of `token_ids`; bytes that are not UTF-8 become U+FFFD."""
        text = self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return _cleaned_up(text) if self.cleans_up else text

    def token_text(self, token_id: int) -> str:
        """Returns the text of one token as it is within a text, special ones included: a space it begins with stays."""
        once, twice = (self.decode([token_id] * count, skip_special_tokens=False) for count in (1, 2))
        return twice[len(once) :]

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the UTF-8 bytes of one token, special ones included; it may hold a part of a character."""
        text = self.token_text(token_id)
        if _LOST not in text:
            return text.encode()
        piece = self.backend.id_to_token(token_id) or ""
        if byte := _BYTE_TOKEN.fullmatch(piece):
            return bytes.fromhex(byte[1])
        return bytes(_BYTES[letter] for letter in piece) if _BYTES.keys() >= set(piece) else text.encode()

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if half := _HALF_PAIR.search(text):
            raise VocabtrimError(
                f"the tokenizer cannot encode this text: character {half.start()} is half of a surrogate pair; decode "
                "the text's bytes or JSON as a whole"
            )
        try:
            if len(text) > _LONG:  # `encode` would let no other thread run, for a second and more
                return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # bare in the library: a word where there is no unknown token
            raise VocabtrimError(f"the tokenizer cannot encode this text: {error}") from error

    def stream(self, skip_special_tokens: bool = True) -> "TextStream":
        """Returns a decoder that takes one token at a time."""
        return TextStream(self, skip_special_tokens)


class TextStream:
    """Turns tokens into text as they come, and holds a character back until all of its bytes have come.

    Attributes:
        text: The text returned so far. After `finish` it equals `Tokenizer.decode` of all tokens, except where later
            tokens change the text of earlier ones (byte-fallback vocabularies, on bytes that are not UTF-8).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._token_ids: list[int] = []
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._open = ""  # text that the next token may change, in vocabularies whose text is cleaned up

    def push(self, token_id: int) -> str:
        """Returns the text that `token_id` completes; "" within an unfinished character and for a special token."""
        self._token_ids.append(token_id)
        try:
            piece = self._stream.step(self._tokenizer.backend, token_id) or ""
        except Exception:  # of no class of its own: the token changes text that was returned already
            self._stream = DecodeStream(skip_special_tokens=self._skips)
            piece = self._stream.step(self._tokenizer.backend, token_id) or ""
        if self._tokenizer.cleans_up:
            piece = self._settled(piece)
        self.text += piece
        return piece

    def _settled(self, piece: str) -> str:
        """Returns the text that no later token can change any more, cleaned up, and keeps the rest."""
        text = self._open + piece
        end = len(text.rstrip(_OPEN))
        self._open = text[end:]
        return _cleaned_up(text[:end])

    def finish(self) -> str:
        """Returns the text still held back: the bytes of a character that was never completed."""
        whole = self._tokenizer.decode(self._token_ids, self._skips)
        piece = whole[len(self.text) :] if whole.startswith(self.text) else ""
        self.text += piece
        return piece


def _cleaned_up(text: str) -> str:
    """Returns the text as transformers' `clean_up_tokenization` does."""
    for before, after in _CLEANED:
        text = text.replace(before, after)
    return text


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the texts of `bos_token`, `eos_token` and other special tokens, those with a model's own names included.

    Older configs have objects instead of texts.
    """
    named = dict(config)
    for group in ("extra_special_tokens", "model_specific_special_tokens"):
        named |= config[group] if isinstance(config.get(group), dict) else {}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in named.items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _template_files(root: Path) -> dict[str, str]:
    """Returns the templates that a directory holds in files of their own, by name."""
    files = {path.stem: path for path in sorted((root / TEMPLATES_NAME).glob("*.jinja"))}
    if (root / TEMPLATE_NAME).is_file():
        files[DEFAULT] = root / TEMPLATE_NAME
    try:
        return {name: path.read_text("utf-8") for name, path in files.items()}
    except UnicodeDecodeError as error:
        raise VocabtrimError(f"a chat template in {root} is not UTF-8 text: export the bundle again") from error
