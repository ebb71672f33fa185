"""What `real_pair.py` measured: generations → a row for each domain and way of decoding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

TARGET_ONLY = "target only"


@dataclass(frozen=True, slots=True)
class Generation:
    """One prompt, decoded one way. Rounds and seconds are those after the prefill."""

    domain: str
    way: str
    tokens: int
    rounds: int
    drafted: int
    accepted: int
    looked_up: int
    looked_up_accepted: int
    paused: int
    seconds: float
    is_equal: bool


@dataclass(frozen=True, slots=True)
class Row:
    """A way on a domain. speedup: tokens/s over the target's alone; median_speedup: of the prompts' own ratios."""

    domain: str
    way: str
    tokens_per_second: float
    speedup: float
    median_speedup: float
    block_efficiency: float
    drafted_per_round: float
    looked_up_share: float
    paused_share: float
    equal_outputs: bool


def summarize(generations: Sequence[Generation]) -> list[Row]:
    """A row for each domain and way, and for all domains together."""
    domains = list(dict.fromkeys(each.domain for each in generations))
    ways = list(dict.fromkeys(each.way for each in generations))
    rows = []
    for domain in [*domains, "all"]:
        inside = [each for each in generations if domain in (each.domain, "all")]
        alone = [each for each in inside if each.way == TARGET_ONLY]
        rows += [row(domain, [each for each in inside if each.way == way], alone) for way in ways]
    return rows


def row(domain: str, own: Sequence[Generation], alone: Sequence[Generation]) -> Row:
    def total(number: Callable[[Generation], float], of: Sequence[Generation] = own) -> float:
        return sum(map(number, of))

    speed = total(lambda g: g.tokens) / total(lambda g: g.seconds)
    base = total(lambda g: g.tokens, alone) / total(lambda g: g.seconds, alone)
    rounds = total(lambda g: g.rounds)
    ratios = [
        (mine.tokens / mine.seconds) / (its.tokens / its.seconds)
        for mine, its in zip(own, alone, strict=True)
        if mine.rounds and its.rounds
    ]
    return Row(
        domain,
        own[0].way,
        tokens_per_second=speed,
        speedup=speed / base,
        median_speedup=median(ratios),
        block_efficiency=total(lambda g: g.tokens) / rounds,
        drafted_per_round=total(lambda g: g.drafted) / rounds,
        looked_up_share=total(lambda g: g.looked_up_accepted) / total(lambda g: g.tokens),
        paused_share=total(lambda g: g.paused) / rounds,
        equal_outputs=all(each.is_equal for each in own),
    )
