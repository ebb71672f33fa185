"""What a verification reads of a mixture of experts, where a step of one token reads less."""

from dataclasses import dataclass

from engines.bundle.manifest import Manifest


@dataclass(frozen=True, slots=True)
class ExpertReads:
    """What a call of several tokens is expected to read of a target's experts; `str` gives it in words.

    Attributes:
        tokens: The tokens of the call; the mean number where drafts differ in length.
        one_picks: Experts of a layer that one token picks.
        distinct: Distinct experts of a layer that the call picks; with one_picks, a mean over all layers by their
            bytes.
        weights: The weights that it reads, over those that a step of one token reads.
        is_measured: The number is that of a text, measured when the target was exported. Otherwise tokens are supposed
            to pick independently of each other, which overstates it.
    """

    tokens: float
    one_picks: float
    distinct: float
    weights: float
    is_measured: bool

    @classmethod
    def of(cls, target: Manifest, tokens: float) -> "ExpertReads | None":
        """Returns what a call of `tokens` tokens reads of `target`; None for a dense model."""
        if not (experts := target.experts):
            return None
        total = sum(each.bytes for each in experts)
        one, several = (sum(e.expected_distinct(n) * e.bytes for e in experts) / total for n in (1, tokens))
        weights = target.weight_bytes(tokens) / target.weight_bytes(1)
        return cls(tokens, one, several, weights, all(len(each.distinct) >= tokens for each in experts))

    def __str__(self) -> str:
        source = "measured along text" if self.is_measured else "if each token picks independently of the others"
        return (
            f"{self.tokens:.3g} tokens read {self.distinct:.1f} experts of a layer where one token reads "
            f"{self.one_picks:g}, and {self.weights:.2f} times its weights ({source})"
        )
