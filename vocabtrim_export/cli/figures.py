"""A text that is printed as it is generated, and the line of figures after it."""

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime import Stats
    from runtime.stream import Stream


@dataclass(frozen=True, slots=True)
class Printed:
    """A printed generation.

    Attributes:
        text: The text.
        first_token_seconds: The time to its first token.
    """

    text: str
    first_token_seconds: float


def print_text(stream: "Stream") -> Printed:
    """Print a generation, which begins now, on standard output as it comes, and a newline."""
    began, pieces, first = perf_counter(), list[str](), 0.0
    for token in stream:
        first = first or perf_counter() - began
        pieces.append(token.text)
        print(token.text, end="", flush=True)
    print(flush=True)
    return Printed("".join(pieces), first)


def figures_line(stats: "Stats", ending: str, first_token_seconds: float) -> str:
    """Returns one line that says how long a text is, how fast it came and what explains the speed.

    Args:
        stats: Sums over the text's rounds.
        ending: The reason that the text ended, such as "stop".
        first_token_seconds: The time to the first token.
    """
    line = f"{stats.tokens} tokens, {ending}; {stats.tokens_per_second:.1f} tokens/s"
    line += f", first token after {first_token_seconds:.2f} s, block efficiency {stats.block_efficiency:.2f}"
    line += f", {stats.accepted / stats.drafted:.0%} of drafted tokens accepted" if stats.drafted else ""
    line += f", {stats.looked_up_accepted} tokens from prompt lookup" if stats.looked_up_accepted else ""
    line += f", {stats.cached} tokens of the prompt were in the cache" if stats.cached else ""
    line += f", drafting did not pay in {stats.paused} of {stats.rounds} rounds" if stats.paused else ""
    return f"[{line}{', acceptance collapsed' if stats.collapse else ''}]"
