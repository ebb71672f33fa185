"""`HeldText`: the text that the KV caches of a pair hold, and what can be done with it besides generating."""

from collections.abc import Callable, Sequence

from engines.base import Engine
from engines.bundle.tokenizer import Tokenizer
from engines.closing import Closing
from engines.exclusive_use import held
from runtime.kept_prefix import kept_prefix
from runtime.logprobs import TokenLogprob
from runtime.prompt_logprobs import prompt_logprobs
from runtime.prompt_tokens import check_prompt
from runtime.snapshot import Snapshot, restore_snapshot, snapshot_bytes, take_snapshot


class HeldText(Closing):
    """A pair of engines, which it owns and closes, and the one text that they hold.

    Attributes:
        target: The engine whose output is generated.
        drafter: The engine that drafts; None: the target decodes alone.
        tokenizer: The target's tokenizer; None where prompts are token ids.
    """

    def __init__(self, target: Engine, drafter: Engine | None, tokenizer: Tokenizer | None) -> None:
        self.target = target
        self.drafter = drafter
        self.tokenizer = tokenizer

    def kept_prefix(self, token_ids: Sequence[int]) -> int:
        """Returns how many of the first tokens of a prompt this decoder would not read again.

        Args:
            token_ids: The prompt as `encode` returns it.
        """
        return kept_prefix(self.target, token_ids)

    @property
    def snapshot_bytes(self) -> int:
        """The size that a `snapshot` would have now, in bytes; 0 where there is no text."""
        return snapshot_bytes(self.target, self.drafter)

    def snapshot(self) -> Snapshot | None:
        """Copy the text that this decoder holds and what both KV caches hold of it, after the round that runs now.

        `restore` in this decoder or in a fork then goes on with that text, or with another that begins like it, without
        reading it again. The outputs are those of a decoder that has read it.

        Returns:
            The copy; None where there is no text, or where an engine cannot copy its cache (TensorRT's cannot).
        """
        with self.target.use.running:
            self.target.use.check_open()
            return take_snapshot(self.target, self.drafter)

    def restore(self, snapshot: Snapshot, length: int | None = None) -> None:
        """Hold the text of a snapshot instead of the present one: the next generation reads what is new after it.

        Args:
            snapshot: The copy, made by a decoder over the same bundles.
            length: The number of its first tokens to take; None: all that the target has read.

        Raises:
            VocabtrimError: The snapshot was made with other bundles, or another thread's generation is unfinished.
            ValueError: The snapshot holds fewer tokens.
        """
        with held([engine.use for engine in (self.target, self.drafter) if engine]):
            length = snapshot.target.length if length is None else length
            restore_snapshot(self.target, self.drafter, snapshot, length)

    def prompt_logprobs(
        self, token_ids: Sequence[int], top: int = 0, is_cancelled: Callable[[], bool] = lambda: False
    ) -> tuple[TokenLogprob, ...]:
        """Compute the log-probability of each token of a text after those before it; the first one has none.

        The text is read from its first token on. A generation after the same token ids then goes on from there.

        Args:
            token_ids: The text, as `encode` returns it.
            top: The number of alternatives to give for each token.
            is_cancelled: Asked between the parts of a long text whether to stop reading it.

        Returns:
            One entry for each token but the first.

        Raises:
            VocabtrimError: The text does not fit the context, its reading was cancelled, or another thread's
                generation is unfinished.
        """
        check_prompt(list(token_ids), self.target, self.tokenizer)
        with held([engine.use for engine in (self.target, self.drafter) if engine], is_cancelled):
            return prompt_logprobs(self.target, self.drafter, token_ids, top)

    def close(self) -> None:
        """Close both engines, after the round that runs now. Calling it again does nothing."""
        self.target.close()
        if self.drafter:
            self.drafter.close()
