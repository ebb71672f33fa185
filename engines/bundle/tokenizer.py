"""`Tokenizer`: text ↔ token ids from a bundle's own files, with the chat template, without transformers."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Self

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream

from engines.errors import VocabtrimError

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"


def tokenizer_digest(tokenizer: tokenizers.Tokenizer) -> str:
    """sha256, in hex, of the token → id table with its added tokens, as JSON sorted by token.

    Only the table counts: two exports of one vocabulary agree whatever their normaliser or template says.
    """
    table = tokenizer.get_vocab(with_added_tokens=True)
    return hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Tokenizer:
    """Encodes prompts and decodes generations as transformers' `AutoTokenizer` does on the same files."""

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], chat_template: str | None) -> None:
        """Take `backend` over: truncation and padding are switched off in it.

        config: the content of `tokenizer_config.json`. chat_template: jinja2 source.
        Raises `VocabtrimError` for a template that does not parse.
        """
        backend.no_truncation()  # a saved training set-up must not cut or pad a prompt
        backend.no_padding()
        self.backend = backend
        self._special_tokens = _special_tokens(config)
        self._template = None if chat_template is None else _compile(chat_template)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read `tokenizer.json`, `tokenizer_config.json` and, where there is one, `chat_template.jinja` of a directory.

        Raises `VocabtrimError` for a file that is missing or malformed.
        """
        root = Path(path)
        if not (root / TOKENIZER_NAME).is_file():
            raise VocabtrimError(f"{root} has no {TOKENIZER_NAME}: export the bundle again from a model with one")
        try:
            backend = tokenizers.Tokenizer.from_file(str(root / TOKENIZER_NAME))
        except Exception as error:  # the library raises bare Exception
            raise VocabtrimError(f"{root / TOKENIZER_NAME} is not a tokenizer ({error})") from error
        try:
            config = json.loads((root / CONFIG_NAME).read_text("utf-8")) if (root / CONFIG_NAME).is_file() else {}
        except ValueError as error:
            raise VocabtrimError(f"{root / CONFIG_NAME} is not JSON ({error})") from error
        template = root / TEMPLATE_NAME
        return cls(backend, config, template.read_text("utf-8") if template.is_file() else _template_of(config))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def digest(self) -> str:
        """See `tokenizer_digest`."""
        return tokenizer_digest(self.backend)

    def encode(self, text: str) -> list[int]:
        """The ids of plain text, with the special tokens that the tokenizer puts around it (BOS, for many).

        Raises `VocabtrimError` for text that the tokenizer has no tokens for.
        """
        return self._ids(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of a conversation up to where the assistant's answer begins.

        messages: `{"role": …, "content": …}` each. Raises `VocabtrimError` where there is no template or it refuses.
        """
        if self._template is None:
            raise VocabtrimError("this tokenizer has no chat template: give the prompt as plain text")
        try:
            text = self._template.render(
                messages=list(messages), tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise VocabtrimError(f"the chat template refused the messages: {' '.join(str(error).split())}") from error
        return self._ids(text, add_special_tokens=False)  # the template wrote them

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(token_ids, skip_special_tokens=True)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # bare in the library: half a character, or a word where there is no unknown token
            raise VocabtrimError(f"the tokenizer cannot encode this text: {error}") from error

    def stream(self) -> "TextStream":
        """A decoder that takes one token at a time."""
        return TextStream(self)


class TextStream:
    """Turns tokens into text as they come, holding back a character until all of its bytes are there.

    `text` is what was given out so far. After `finish` it equals `Tokenizer.decode` of all tokens, except where
    later tokens change how earlier ones read (byte-fallback vocabularies, on bytes that are not UTF-8).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, "" where a character is unfinished or the token is special."""
        self._token_ids.append(token_id)
        try:
            piece = self._stream.step(self._tokenizer.backend, token_id) or ""
        except Exception:  # bare in the library: this token changed how text already given out reads. Begin anew.
            self._stream = DecodeStream(skip_special_tokens=True)
            piece = self._stream.step(self._tokenizer.backend, token_id) or ""
        self.text += piece
        return piece

    def finish(self) -> str:
        """The text still held back: the bytes of a character that never became whole."""
        whole = self._tokenizer.decode(self._token_ids)
        piece = whole[len(self.text) :] if whole.startswith(self.text) else ""
        self.text += piece
        return piece


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _compile(source: str) -> jinja2.Template:
    """Compile as transformers does (`utils/chat_template_utils.py`): templates are written against its environment."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise VocabtrimError(f"the chat template does not parse: {' '.join(str(error).split())}") from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like; older files write them as objects."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _template_of(config: Mapping[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones, as older files keep them
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return template if isinstance(template, str) else None
