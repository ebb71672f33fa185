"""Opens the engines and the tokenizer that a decoder is made of, or forks its engines."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from engines.base import Engine
from engines.bundle.tokenizer import TOKENIZER_NAME, Tokenizer


@contextmanager
def opened(
    target: str | Path, drafter: str | Path | None, device: str, drafter_device: str | None
) -> Iterator[tuple[Engine, Engine | None, Tokenizer | None]]:
    """Load bundles for a block that takes over the engines. If the block raises, they are closed.

    Args:
        target: The target's bundle.
        drafter: The drafter's bundle; None for the target alone.
        device: "cpu" or "cuda".
        drafter_device: The drafter's device; None: `device`.

    Yields:
        The target, the drafter, and the target's tokenizer, if its bundle has one.

    Raises:
        VocabtrimError: A bundle is damaged or cannot run on its device.
    """
    from engines import load_engine
    from engines.load import load_pair

    with ExitStack() as stack, ThreadPoolExecutor(max_workers=1) as thread:
        reading = thread.submit(Tokenizer.load, target)
        drafter_engine = None
        if drafter is None:
            target_engine = stack.enter_context(load_engine(target, device))
        else:
            target_engine, drafter_engine = map(stack.enter_context, load_pair(target, drafter, device, drafter_device))
        tokenizer = reading.result() if TOKENIZER_NAME in target_engine.manifest.files else None
        yield target_engine, drafter_engine, tokenizer
        stack.pop_all()


def forked(target: Engine, drafter: Engine | None) -> tuple[Engine, Engine | None]:
    """Returns engines over the same weights. The drafter's shares the KV cache of the target's where these two do.

    Raises:
        VocabtrimError: The engines cannot be forked.
    """
    own = target.fork()
    return own, drafter and drafter.fork(own if drafter.cache is target.cache else None)
