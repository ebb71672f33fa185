"""`GenerationRules`: the rules of a model's generation config that change logits, as a bundle stores them."""

from dataclasses import dataclass, fields

from engines.arguments import LARGEST, SMALLEST
from engines.errors import VocabtrimError

UNSUPPORTED_NOTE = "not applied, although the model's generation config has it"


@dataclass(frozen=True, slots=True)
class GenerationRules:
    """The rules that change the next token's logits, with the meaning that they have in transformers.

    The defaults change nothing.

    Attributes:
        repetition_penalty: Divides the positive logits, multiplies the negative ones, of every token that the prompt
            or the output holds.
        no_repeat_ngram_size: No sequence of this many tokens occurs twice; 0 allows it.
        bad_words_ids: Sequences of tokens that are never completed. A single EOS among them is ignored.
        min_length: Tokens, of prompt and output together, before which no EOS is chosen.
        min_new_tokens: New tokens before which no EOS is chosen.
        suppress_tokens: Tokens that are never chosen.
        begin_suppress_tokens: Tokens that are never chosen as the first new one.
        unsupported: Rules of the generation config that are not applied, each as "name=value".

    Raises:
        VocabtrimError: A value is out of range.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    unsupported: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not SMALLEST <= self.repetition_penalty <= LARGEST:
            raise VocabtrimError(
                f"repetition_penalty is {self.repetition_penalty}: give a number above 0 and up to {LARGEST:.1e}; "
                "1 changes nothing"
            )
        if not all(self.bad_words_ids):
            raise VocabtrimError("bad_words_ids has an empty sequence: leave it out")
        if any(token < 0 for word in self.bad_words_ids for token in word):
            raise VocabtrimError("bad_words_ids has a negative token id: leave that sequence out")

    def applied(self) -> str:
        """Returns the rules that change something, such as "repetition_penalty 1.1, no_repeat_ngram_size 3", or ""."""
        values = {each.name: (getattr(self, each.name), each.default) for each in fields(self)}
        del values["unsupported"]
        return ", ".join(f"{name} {value}" for name, (value, neutral) in values.items() if value != neutral)
