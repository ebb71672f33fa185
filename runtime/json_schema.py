"""`JsonSchemas`: JSON schemas → constraints on a target's tokens, by llguidance."""

import json
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from math import lcm
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle.manifest import Manifest
from engines.bundle.tokenizer import Tokenizer
from engines.errors import VocabtrimError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_BYTES = 64 << 10  # of a schema as JSON: the time to compile grows faster than its size
_MOST_STATES = 50_000  # of the lexer, 1 to 2 kB each
_MOST_MULTIPLE = 100_000  # llguidance makes an automaton of so many states, which no limit of its own bounds: 0.3 s
# A space, or a new line and its indentation. llguidance's default takes any white space, which a model may never end.
_WHITE_SPACE = r"[ ]|\n[ \t]{0,40}"


class JsonSchemas:
    """Makes constraints of JSON schemas for one target, in any thread. Forks of a decoder share it."""

    def __init__(self, tokenizer: Tokenizer | None, target: Manifest) -> None:
        """Note for what to make constraints; nothing is imported or computed yet.

        Args:
            tokenizer: The target's tokenizer; None where it has none.
            target: The target's manifest.
        """
        self._source, self._target = tokenizer, target
        self._lock = Lock()
        self._tokenizer: LLTokenizer | None = None

    def constraint(self, schema: Mapping[str, Any] | bool) -> "JsonConstraint":
        """Compile a schema. References to other documents are errors: nothing is read or fetched.

        Args:
            schema: The schema; True allows any JSON.

        Returns:
            A constraint for one generation.

        Raises:
            VocabtrimError: The schema is malformed, unsupported or beyond the limits, llguidance is not installed or
                cannot read the tokenizer, or the target has no tokenizer or no EOS.
        """
        text = _checked(schema)
        tokenizer = self._read_tokenizer()
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=_MOST_STATES, verbose_errors=False)
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITE_SPACE})
        except ValueError as error:
            raise VocabtrimError(f"the JSON schema cannot be read: {_one_line(str(error))}") from error
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise VocabtrimError(f"the JSON schema cannot be applied: {_one_line(matcher.get_error())}")
        return JsonConstraint(matcher, self._target.vocab_size, tokenizer.eos_tokens)

    def _read_tokenizer(self) -> "LLTokenizer":
        with self._lock:  # it takes about a second for 150,000 tokens, once
            if self._tokenizer is None:
                self._tokenizer = _read_tokenizer(self._source, self._target)
            return self._tokenizer


class JsonConstraint:
    """A `Constraint`: the tokens with which a text can go on to JSON of the schema."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._matcher, self._vocab_size, self._eos = matcher, vocab_size, frozenset(eos_token_ids)
        self._behind = 0  # tokens from the first EOS on, which the matcher is not told of

    def allowed(self) -> NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def advance(self, token: int) -> None:
        if self._behind or token in self._eos:
            self._behind += 1
            return
        self._matcher.consume_token(token)
        self._check()

    def rewind(self, count: int) -> None:
        behind = min(count, self._behind)
        self._behind -= behind
        if count > behind:
            self._matcher.rollback(count - behind)

    def fitting(self, tokens: Sequence[int]) -> int:
        return 0 if self._behind else self._matcher.validate_tokens(list(tokens))

    def _check(self) -> None:
        if self._matcher.is_error():
            why = _one_line(self._matcher.get_error())
            raise VocabtrimError(f"the JSON schema is too complex to be followed here: {why}")


def _checked(schema: Mapping[str, Any] | bool) -> str:
    """Returns a schema as JSON. Raises `VocabtrimError` where it is none, or beyond what is compiled in a moment."""
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise VocabtrimError(
            f"json_schema is {type(schema).__name__}: give a JSON schema as a dict, or True for any JSON"
        )
    try:
        text = json.dumps(dict(schema), allow_nan=False)
        if len(text) > MOST_BYTES:
            raise VocabtrimError(f"the JSON schema has {len(text)} bytes: shorten it to at most {MOST_BYTES}")
        multiples = {Fraction(str(value)) for value in _multiples(json.loads(text)) if value > 0}
    except (TypeError, ValueError, RecursionError) as error:
        raise VocabtrimError(f"json_schema is not JSON, or nested too deeply: {_one_line(str(error))}") from error
    whole = lcm(*(each.denominator for each in multiples))
    if lcm(*(int(each * whole) for each in multiples)) > _MOST_MULTIPLE:
        raise VocabtrimError(f"multipleOf of the JSON schema asks for too much: at most {_MOST_MULTIPLE} steps in all")
    return text


def _multiples(node: Any) -> Iterator[float]:
    """Returns the values of every `multipleOf` in a schema."""
    if isinstance(node, dict):
        value = node.get("multipleOf")
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield value
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _multiples(child)


def _read_tokenizer(tokenizer: Tokenizer | None, target: Manifest) -> "LLTokenizer":
    if tokenizer is None:
        raise VocabtrimError(
            "json_schema needs the target's tokenizer, and this decoder has none: make it with SpeculativeDecoder.load"
        )
    try:
        from llguidance import LLTokenizer
    except ModuleNotFoundError as error:
        raise VocabtrimError("json_schema needs llguidance: pip install 'vocabtrim-export[json]'") from error
    known = 1 + max(tokenizer.backend.get_vocab(with_added_tokens=True).values())
    eos = [token for token in target.eos_token_ids if token < min(known, target.vocab_size)]
    if not eos:
        raise VocabtrimError(
            "json_schema needs a target with an EOS token, which ends the JSON, and this one has none: leave "
            "json_schema out"
        )
    try:
        return LLTokenizer(tokenizer.backend.to_str(), n_vocab=max(known, target.vocab_size), eos_token=eos)
    except Exception as error:  # ValueError, or a panic of the library
        raise VocabtrimError(f"llguidance cannot read this target's tokenizer: {_one_line(str(error))}") from error


def _one_line(message: str) -> str:
    line = " ".join(message.replace("<non-verbose/>", "").split())
    return line if len(line) <= 200 else f"{line[:200]}…"
