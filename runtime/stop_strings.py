"""Text that ends where one of several strings begins, given out no sooner than that is certain."""

from collections.abc import Sequence

from engines.errors import VocabtrimError


class StopStrings:
    """Holds back the end of a text while it could still be the beginning of one of the strings `stop`.

    The strings are looked for in the text with its special tokens, so that one of them can be a special token; what is
    given out is the text without them.
    """

    def __init__(self, stop: str | Sequence[str] | None) -> None:
        """Look for one string or several.

        Raises:
            VocabtrimError: One is empty, or no string.
        """
        if stop is not None and not hasattr(stop, "__iter__"):
            raise VocabtrimError(f"stop is {stop!r}: give a string, or a list of strings")
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
        for string in self._stop:
            if not isinstance(string, str):
                raise VocabtrimError(f"a stop string is {type(string).__name__}, not text: give strings")
            if not string:
                raise VocabtrimError("a stop string is empty: give at least one character")
        self._held: list[tuple[str, str]] = []  # pieces of the text: with special tokens, and without

    def push(self, piece: str, shown: str, is_last: bool) -> tuple[str, bool]:
        """Return what may be given out now that one more piece has come, and whether a stop string has.

        The text then ends. Of several strings in one piece, the one that begins first counts.

        Args:
            piece: The new text, special tokens included.
            shown: The new text without special tokens.
            is_last: Whether no text follows: then nothing is held back.
        """
        self._held.append((piece, shown))
        text = "".join(held for held, _ in self._held)
        positions = [at for string in self._stop if (at := text.find(string)) >= 0]
        if positions:
            return self._release(min(positions)), True
        return self._release(len(text) if is_last else len(text) - self._beginning(text)), False

    def _release(self, length: int) -> str:
        """Take the first `length` characters of the held text, and return what of them is shown."""
        released = ""
        while self._held:
            piece, shown = self._held[0]
            if len(piece) > length:
                # Within a piece both texts end alike: a decoder may have taken a space from the shown one's beginning.
                cut = max(0, len(shown) - (len(piece) - length))
                self._held[0] = piece[length:], shown[cut:]
                return released + shown[:cut]
            del self._held[0]
            length -= len(piece)
            released += shown
        return released

    def _beginning(self, text: str) -> int:
        """Returns the number of characters at the end of `text` that begin a stop string."""
        lengths = (
            length
            for string in self._stop
            for length in range(1, min(len(string) - 1, len(text)) + 1)
            if text.endswith(string[:length])
        )
        return max(lengths, default=0)
