"""Text that ends where one of several strings begins, given out no sooner than that is certain."""

from collections.abc import Sequence

from engines.errors import VocabtrimError


class StopStrings:
    """Holds back the end of a text while it could still be the beginning of one of the strings `stop`.

    Raises `VocabtrimError` for an empty string.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if not all(stop):
            raise VocabtrimError("a stop string is empty: give at least one character")
        self._stop = tuple(stop)
        self._held = ""

    def push(self, piece: str, is_last: bool) -> tuple[str, bool]:
        """What may be given out now that `piece` has come, and whether a stop string has: the text then ends.

        Of several strings in one piece, the one that begins first counts. is_last: no text follows, nothing is held.
        """
        text = self._held + piece
        found = [at for string in self._stop if (at := text.find(string)) >= 0]
        if found:
            return text[: min(found)], True
        held = 0 if is_last else self._beginning(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def _beginning(self, text: str) -> int:
        """How many characters at the end of `text` a stop string begins with."""
        lengths = (
            length
            for string in self._stop
            for length in range(1, min(len(string) - 1, len(text)) + 1)
            if text.endswith(string[:length])
        )
        return max(lengths, default=0)
