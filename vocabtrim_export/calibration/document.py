"""`Document`: one unit of calibration, and raw text cut into several."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

# A long text becomes several documents of this many characters: each is a prompt of its own, and a part of them can
# be held out even where the corpus is a single file.
MIN_PIECE, MAX_PIECE = 1000, 2000


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat; `role` is "system", "user", "assistant", or what the file says for other ones."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """One unit of calibration. Two documents of one content are equal, wherever they stand.

    text: all of its text, every turn of a conversation included.
    prompt: what a model is asked to continue: at most one system message, then one user message.
        A conversation's is its first user turn with the system text before it; later turns are not prompts.
        Empty for raw text, where the model continues `text` itself.
    where: its place, "data.jsonl, line 3".
    parts: the contents of its messages, which `text` joins; empty for raw text.
    answers: those of them that the assistant wrote.
    """

    text: str
    prompt: tuple[Message, ...] = ()
    where: str = field(default="", compare=False)
    parts: tuple[str, ...] = field(default=(), compare=False)
    answers: tuple[str, ...] = field(default=(), compare=False)

    @property
    def prompt_length(self) -> int:
        """Characters of what a model is asked to continue."""
        return sum(len(message.content) for message in self.prompt) or len(self.text)

    @property
    def counted_texts(self) -> tuple[str, ...]:
        """What the calibration source "text" counts, each text by itself: nothing was ever written between them.

        A model writes the assistant's messages alone; where there is none, everything is all that there is.
        """
        return self.answers or self.parts or (self.text,)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that was left out. where: its place, "" where it has none."""

    where: str
    reason: str


def describe_skipped(skipped: Sequence[Skipped], most: int = 5) -> str:
    """One line that counts the records left out and names the first of them with their reasons."""
    named = [f"{each.where}: {each.reason}" if each.where else each.reason for each in skipped[:most]]
    more = f"; and {len(skipped) - most} more" if len(skipped) > most else ""
    records = "record was" if len(skipped) == 1 else "records were"
    return f"{len(skipped)} {records} skipped: {'; '.join(named)}{more}"


def skipped_note(skipped: Sequence[Skipped]) -> tuple[str, ...]:
    """Returns the line of `describe_skipped`, or nothing where nothing was left out."""
    return (describe_skipped(skipped),) if skipped else ()


def cut_text(chunks: Iterable[str]) -> Iterator[str]:
    """Cut a text into pieces of at most `MAX_PIECE` characters, at a blank line, else a line's end, else a space.

    Args:
        chunks: The text in parts of any size. Only one of them and a piece's length are held in memory.

    Yields:
        The pieces without the space around them; none that is blank.
    """
    rest = ""
    for chunk in chunks:
        rest, start = rest + chunk, 0
        while len(rest) - start > MAX_PIECE:
            ends = (rest.rfind(mark, start + MIN_PIECE, start + MAX_PIECE) for mark in ("\n\n", "\n", " "))
            end = next((at for at in ends if at >= 0), start + MAX_PIECE)
            if piece := rest[start:end].strip():
                yield piece
            start = end
        rest = rest[start:]
    if piece := rest.strip():
        yield piece
