"""Reuse of the tokens that a prompt shares with the text before, which the KV caches of a pair hold already."""

from collections.abc import Sequence

from engines.base import Engine


def kept_prefix(target: Engine, prompt: Sequence[int]) -> int:
    """Returns how many of the first tokens of `prompt` the target's cache holds.

    The last token of a prompt never counts: it is fed for what it predicts.

    Args:
        target: The engine; its `text` is that of the generation whose end it holds.
        prompt: Token ids.
    """
    text = target.text
    if target.length != len(text) - 1:  # something else was fed since, or a round broke off
        return 0
    most = min(target.length, len(prompt) - 1)
    return next((index for index in range(most) if text[index] != prompt[index]), most)


def restart(target: Engine, drafter: Engine | None, prompt: Sequence[int], keep: bool) -> int:
    """Make both engines ready to read a prompt from the first token on that the target has not read.

    Args:
        target: The target.
        drafter: The drafter, which may have read less of the prompt than the target; None for the target alone.
        prompt: Token ids.
        keep: Keep what the caches hold of the prompt; otherwise both start empty.

    Returns:
        How many tokens of the prompt the target's cache holds.
    """
    kept = kept_prefix(target, prompt) if keep else 0
    if drafter:
        read = min(drafter.length, kept) if drafter.text is target.text else 0
        if drafter.features_read:
            # Row t of a head is made of token t + 1 as well; and the target gives the features of what it reads only.
            kept = read = min(read, max(kept - 1, 0))
        drafter.restart(read)
    target.restart(kept)
    return kept


def note_text(target: Engine, drafter: Engine | None, text: Sequence[int]) -> None:
    """Note whose text both caches hold.

    Args:
        target: The target, which has read all of the text but its last token.
        drafter: The drafter, which has read as much or less.
        text: The text so far; the list may grow.
    """
    target.text = text
    if drafter:
        drafter.text = text
