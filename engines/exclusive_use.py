"""An engine serves one generation at a time, because its KV cache holds one text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, Thread, current_thread
from types import TracebackType
from weakref import ref

from engines.errors import VocabtrimError
from engines.turns import Turns

_IN_USE = (
    "another thread generates with this decoder, which holds one text at a time: give each thread (or asyncio task) "
    "its own with decoder.fork(), or finish or close() the other stream first"
)
_ENDED = "another generation of this decoder has ended this stream: its KV cache holds the other text now"
_CLOSED = "the decoder is closed (by close() or the end of its `with` block): load it again"


class ExclusiveUse:
    """Keeps two generations from writing into one engine's KV cache.

    The newest generation of a thread ends the thread's earlier one. While a generation is unfinished, other threads
    are refused; it stops counting when it is finished, closed or dropped, or when its thread has ended.

    Attributes:
        turns: Shared with the engines that compute with the same cores: each round of a generation is a turn.
    """

    def __init__(self) -> None:
        self.turns = Turns()
        self.running = Lock()  # held while the engine computes, or waits for its turn
        self.holder: Claim | None = None  # whose text the KV cache holds; changed only while `running` is held
        self.is_closed = False

    def close(self) -> None:
        """Refuse all further rounds, and wait for the round that runs now."""
        self.is_closed = True
        with self.running:
            pass

    def pass_on(self) -> None:
        """Let others compute first, between two parts of long work."""
        if self.holder:
            self.holder.pass_on()

    def check_open(self) -> None:
        """Raise `VocabtrimError` if the engine is closed."""
        if self.is_closed:
            raise VocabtrimError(_CLOSED)


class Claim:
    """A generation's right to use its engines; entered as a context manager for each of its rounds."""

    def __init__(self, uses: Sequence[ExclusiveUse]) -> None:
        """Begin a claim.

        Args:
            uses: Those of its engines; the turns are those of the first.
        """
        self._uses, self._turns = uses, uses[0].turns
        self._has_turn = False
        self._has_begun = False
        self._is_released = False
        self._thread: ref[Thread] | None = None  # it ran the last round: a stream may move from thread to thread

    def __enter__(self) -> None:
        """Take the engines for one round, in its turn.

        Raises:
            VocabtrimError: An engine is in use, now holds another generation's text, or is closed.
        """
        held: list[ExclusiveUse] = []
        try:
            for use in self._uses:
                if not use.running.acquire(blocking=False):
                    use.check_open()
                    raise VocabtrimError(_IN_USE)
                held.append(use)
                self._check(use)
            self._turns.begin()
        except BaseException:
            for use in held:
                use.running.release()
            raise
        for use in self._uses:
            use.holder = self
        self._has_begun, self._has_turn, self._thread = True, True, ref(current_thread())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._has_turn = False
        self._turns.end()
        for use in self._uses:
            use.running.release()

    def pass_on(self) -> None:
        """Let others have their turns within a round."""
        if self._has_turn:
            self._turns.pass_on()

    def release(self) -> None:
        """End the generation: other threads may begin theirs."""
        self._is_released = True

    def _check(self, use: ExclusiveUse) -> None:
        use.check_open()
        if use.holder is self:
            return
        if self._has_begun:
            raise VocabtrimError(_ENDED)
        if use.holder is not None and use.holder._excludes(current_thread()):
            raise VocabtrimError(_IN_USE)

    def _excludes(self, thread: Thread) -> bool:
        mine = self._thread() if self._thread else None
        return not self._is_released and mine is not None and mine is not thread and mine.is_alive()


@contextmanager
def held(uses: Sequence[ExclusiveUse]) -> Iterator[None]:
    """Have engines for other work than a generation; this thread's unfinished one ends.

    Raises:
        VocabtrimError: An engine is in use by another thread, or closed.
    """
    claim = Claim(uses)
    try:
        with claim:
            yield
    finally:
        claim.release()
