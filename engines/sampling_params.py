"""`SamplingParams`: how a token is chosen, on the host and on a device."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from engines.arguments import LARGEST, real_number, whole_number
from engines.errors import VocabtrimError
from engines.generation_rules import GenerationRules

_REAL = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_WHOLE = ("top_k", "seed", "no_repeat_ngram_size", "min_new_tokens")
_MAY_BE_NONE = ("repetition_penalty", "seed", "no_repeat_ngram_size", "min_new_tokens")
MIN_TEMPERATURE = 1e-5  # below it float32 logits divide to infinity


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Settings that choose the next token: rules on its logits, then temperature, top-k, top-p and min-p.

    The rules apply to greedy decoding as well. All are applied in transformers' order. Where a rule is None, the
    model's generation config decides, which the target's bundle holds.

    Attributes:
        temperature: 0 is greedy; top_k, top_p, min_p and seed then have no effect.
        top_k: Keeps the k most likely tokens; 0 keeps all.
        top_p: Keeps the fewest tokens that hold this probability; 1 keeps all.
        seed: Seed of the generation's random generator; None takes a fresh one.
        min_p: Keeps the tokens that are at least this times as likely as the most likely one; 0 keeps all.
        repetition_penalty: See `GenerationRules`; 1 changes nothing.
        presence_penalty: Subtracted from the logit of every token that the output (not the prompt) holds.
        frequency_penalty: Subtracted from a token's logit for each time that the output holds it.
        logit_bias: Added to the logits of these token ids, before the penalties.
        no_repeat_ngram_size: See `GenerationRules`; 0 allows repetitions.
        suppress_tokens: Token ids that are never chosen.
        min_new_tokens: New tokens before which no EOS is chosen; replaces the config's `min_length` as well.

    Raises:
        VocabtrimError: A value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    no_repeat_ngram_size: int | None = None
    suppress_tokens: tuple[int, ...] | None = None
    min_new_tokens: int | None = None

    def __post_init__(self) -> None:
        self._convert()
        if not (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= LARGEST):
            raise VocabtrimError(
                f"temperature is {self.temperature}: give 0 (greedy) or a number of at least {MIN_TEMPERATURE}"
            )
        if self.top_k < 0:
            raise VocabtrimError(f"top_k is {self.top_k}: give the number of tokens to keep, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise VocabtrimError(f"top_p is {self.top_p}: give a probability above 0 and up to 1")
        if self.seed is not None and self.seed < 0:
            raise VocabtrimError(f"seed is {self.seed}: give 0 or more")
        if not 0 <= self.min_p <= 1:
            raise VocabtrimError(f"min_p is {self.min_p}: give a number from 0 (keep all tokens) to 1")
        self._check_rules()

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    @property
    def must_repeat_itself(self) -> bool:
        """Whether a seed promises the same text each time: nothing of earlier texts may change how logits round."""
        return not self.is_greedy and self.seed is not None

    def rules(self, defaults: GenerationRules) -> GenerationRules:
        """Returns `defaults`, the rules of a target's bundle, with those replaced that are set here."""
        names = ("repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "min_new_tokens")
        replaced: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if "min_new_tokens" in replaced:  # transformers lets it override the config's min_length
            replaced["min_length"] = 0
        return replace(defaults, **replaced)

    def check_token_ids(self, vocab_size: int) -> None:
        """Check the token ids of `logit_bias` and `suppress_tokens`.

        Args:
            vocab_size: The tokens of the target's vocabulary.

        Raises:
            VocabtrimError: The vocabulary lacks one of them.
        """
        for name, ids in (("logit_bias", self.logit_bias), ("suppress_tokens", self.suppress_tokens or ())):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise VocabtrimError(f"{name} names token {token}: the target's ids go from 0 to {vocab_size - 1}")

    def _convert(self) -> None:
        """Convert every number to Python's own types. Raises `VocabtrimError` for a value that is not a number."""
        for names, convert in ((_REAL, real_number), (_WHOLE, whole_number)):
            for name in names:
                value = getattr(self, name)
                if value is not None or name not in _MAY_BE_NONE:
                    object.__setattr__(self, name, convert(name, value))
        if not isinstance(self.logit_bias, Mapping):
            raise VocabtrimError(f"logit_bias is {self.logit_bias!r}: give a dict of token ids and numbers")
        biases = {
            _token_id("logit_bias", token): real_number(f"logit_bias of token {token}", bias)
            for token, bias in self.logit_bias.items()
        }
        object.__setattr__(self, "logit_bias", biases)
        if self.suppress_tokens is not None:
            if isinstance(self.suppress_tokens, str) or not hasattr(self.suppress_tokens, "__iter__"):
                raise VocabtrimError(f"suppress_tokens is {self.suppress_tokens!r}: give a list of token ids")
            ids = tuple(_token_id("suppress_tokens", token) for token in self.suppress_tokens)
            object.__setattr__(self, "suppress_tokens", ids)

    def _check_rules(self) -> None:
        self.rules(GenerationRules())  # its constructor checks the values
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= LARGEST:
                raise VocabtrimError(f"{name} is {getattr(self, name)}: give a finite number; 0 changes nothing")
        for token, bias in self.logit_bias.items():
            if not abs(bias) <= LARGEST:
                raise VocabtrimError(
                    f"logit_bias of token {token} is {bias}: give a finite number, or name it in suppress_tokens"
                )
        for name in ("no_repeat_ngram_size", "min_new_tokens"):
            if (getattr(self, name) or 0) < 0:
                raise VocabtrimError(f"{name} is {getattr(self, name)}: give 0 or more")


def _token_id(name: str, token: Any) -> int:
    """Returns a token id as an int. The keys of a JSON object are text."""
    is_text = isinstance(token, str) and token.isdecimal()
    return whole_number(f"a token id of {name}", int(token) if is_text else token)


@dataclass(frozen=True, slots=True)
class Sampling:
    """The parameters of a generation that samples, and its random generator."""

    params: SamplingParams
    rng: np.random.Generator
