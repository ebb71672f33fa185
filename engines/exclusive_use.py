"""An engine serves one generation at a time, because its KV cache holds one text."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, Thread, current_thread
from types import TracebackType
from weakref import ref

from engines.errors import VocabtrimError

_IN_USE = (
    "another thread generates with this decoder, which holds one text at a time: give each thread (or asyncio task) "
    "its own with decoder.fork(), or finish or close() the other stream first"
)
_ENDED = "another generation of this decoder has ended this stream: its KV cache holds the other text now"
_UNWANTED = "this text was given up while it was read"
_CLOSED = "the decoder is closed (by close() or the end of its `with` block): load it again"


class ExclusiveUse:
    """Keeps two generations from writing into one engine's KV cache.

    The newest generation of a thread ends the thread's earlier one. While a generation is unfinished, other threads
    are refused; it stops counting when it is finished, closed or dropped, or when its thread has ended.
    """

    def __init__(self) -> None:
        self.running = Lock()  # held while the engine computes
        self.holder: Claim | None = None  # whose text the KV cache holds; changed only while `running` is held
        self.is_closed = False

    def close(self) -> None:
        """Refuse all further rounds, and wait for the round that runs now."""
        self.is_closed = True
        with self.running:
            pass

    def check_wanted(self) -> None:
        """Check that the round that runs is still wanted.

        Raises:
            VocabtrimError: Its generation was cancelled.
        """
        if self.holder and self.holder.is_unwanted:
            raise VocabtrimError(_UNWANTED)

    def check_open(self) -> None:
        """Check that the engine is open.

        Raises:
            VocabtrimError: It is closed.
        """
        if self.is_closed:
            raise VocabtrimError(_CLOSED)


class Claim:
    """A generation's right to use its engines; entered as a context manager for each of its rounds."""

    def __init__(self, uses: Sequence[ExclusiveUse], is_cancelled: Callable[[], bool] = lambda: False) -> None:
        """Begin a claim.

        Args:
            uses: Those of its engines.
            is_cancelled: Asked between the parts of a round whether the rest is unwanted.
        """
        self._uses, self._is_cancelled = uses, is_cancelled
        self._runs = False
        self._has_begun = False
        self._is_released = False
        self._thread: ref[Thread] | None = None  # it ran the last round: a stream may move from thread to thread

    def __enter__(self) -> None:
        """Take the engines for one round.

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
        except BaseException:
            for use in held:
                use.running.release()
            raise
        for use in self._uses:
            use.holder = self
        self._has_begun, self._runs, self._thread = True, True, ref(current_thread())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runs = False
        for use in self._uses:
            use.running.release()

    @property
    def is_unwanted(self) -> bool:
        """Whether a round runs whose generation was cancelled."""
        return self._runs and self._is_cancelled()

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
def held(uses: Sequence[ExclusiveUse], is_cancelled: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Have engines for other work than a generation; this thread's unfinished one ends.

    Args:
        uses: Those of the engines.
        is_cancelled: Asked between the parts of the work whether the rest is unwanted.

    Raises:
        VocabtrimError: An engine is in use by another thread, or closed.
    """
    claim = Claim(uses, is_cancelled)
    try:
        with claim:
            yield
    finally:
        claim.release()
