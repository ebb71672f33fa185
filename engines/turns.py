"""`Turns`: engines that compute with the same cores do so one after another."""

from collections import deque
from threading import Lock


class Turns:
    """A lock that goes to whoever has waited longest.

    `threading.Lock` would go back to the thread that has just released it, round after round.
    """

    def __init__(self) -> None:
        self._guard = Lock()  # held while the two below change
        self._is_taken = False
        self._waiting: deque[Lock] = deque()  # each is locked, and released when the turn is its owner's

    def begin(self) -> None:
        """Wait for a turn, which lasts until `end`."""
        with self._guard:
            if not self._is_taken:
                self._is_taken = True
                return
            mine = Lock()
            mine.acquire()
            self._waiting.append(mine)
        try:
            mine.acquire()
        except BaseException:  # such as Ctrl-C
            self._give_up(mine)
            raise

    def end(self) -> None:
        """Give the turn to the next in line, if there is one."""
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._is_taken = False

    def pass_on(self) -> None:
        """Let all who wait have their turns, and then have another."""
        if self._waiting:
            self.end()
            self.begin()

    def _give_up(self, mine: Lock) -> None:
        with self._guard:
            is_waiting = mine in self._waiting
            if is_waiting:
                self._waiting.remove(mine)
        if not is_waiting:  # the turn has come meanwhile
            self.end()
