"""`Document`: one unit of calibration, and raw text cut into several."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

# A long text becomes several documents of this many characters: each is a prompt of its own, and a part of them can
# be held out even where the corpus is a single file.
MIN_PIECE, MAX_PIECE = 1000, 2000


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat.

    Attributes:
        role: "system", "user", "assistant", or another role that the file names.
        content: The text of the message.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """One unit of calibration. Documents of equal content are equal, whatever their place.

    Attributes:
        text: All of its text, every turn of a conversation included.
        prompt: The messages that a model is asked to continue: at most one system message, then one user message. For a
            conversation these are its first user turn and the system text before it; later turns are not prompts. It is
            empty for raw text, where the model continues `text` itself.
        where: Its place, "data.jsonl, line 3".
        parts: The contents of its messages, which `text` joins; empty for raw text.
        answers: The contents of the assistant's messages among `parts`.
    """

    text: str
    prompt: tuple[Message, ...] = ()
    where: str = field(default="", compare=False)
    parts: tuple[str, ...] = field(default=(), compare=False)
    answers: tuple[str, ...] = field(default=(), compare=False)

    @property
    def prompt_length(self) -> int:
        """Characters of the prompt, or of the raw text, that a model is asked to continue."""
        return sum(len(message.content) for message in self.prompt) or len(self.text)

    @property
    def counted_texts(self) -> tuple[str, ...]:
        """The texts that the calibration source "text" counts, each by itself: no model ever wrote one after another.

        A model writes the assistant's messages alone; where there are none, all parts are counted.
        """
        return self.answers or self.parts or (self.text,)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that was left out.

    Attributes:
        where: Its place; "" where it has none.
        reason: Why it was left out.
    """

    where: str
    reason: str


def without_surrogates(text: str) -> str:
    """Returns the text with "?" for lone surrogates, which JSON can escape and no tokenizer can read."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def describe_skipped(skipped: Sequence[Skipped], most: int = 5) -> str:
    """Returns one line that counts the records left out and names the first of them with their reasons."""
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
