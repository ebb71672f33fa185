"""`PairRounds`: the rounds in which a drafter drafts for targets on its own stream, each made once and kept."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engines.ort_cuda.round import CudaRound
from engines.ort_cuda.sampler import DeviceSampler
from engines.outputs import Speculation
from engines.sampling_params import Sampling, SamplingParams

if TYPE_CHECKING:
    from engines.ort_cuda.engine import OnnxRuntimeCudaEngine

# Each combination of draft length, number of unread tokens and top-k has a round, with buffers as wide as the
# vocabulary.
_KEPT_ROUNDS = 64


class PairRounds:
    """Runs whole rounds of a target and one drafter on the device, and keeps the rounds by their shapes.

    Attributes:
        kept: The rounds, the most recently used one at the end.
        samplers: The samplers of the rounds that sample. Rounds that differ in the number of unread tokens alone share
            one.
    """

    def __init__(self, drafter: "OnnxRuntimeCudaEngine") -> None:
        self._drafter = drafter
        self.kept: dict[tuple[OnnxRuntimeCudaEngine, int, DeviceSampler | int], CudaRound] = {}
        self.samplers: dict[tuple[OnnxRuntimeCudaEngine, int, int, bool, bool], DeviceSampler] = {}

    @property
    def cuda_graphs(self) -> int:
        """The number of kept rounds that run as a CUDA graph."""
        return sum(each.has_graph for each in self.kept.values())

    def speculate(
        self,
        target: "OnnxRuntimeCudaEngine",
        token_ids: Sequence[int] | NDArray[np.int64],
        draft_length: int,
        sampling: Sampling | None,
    ) -> Speculation | None:
        """Draft and verify in one piece of work, and advance both engines' caches.

        Args:
            target: The engine that verifies.
            token_ids: int64[n], what the drafter has not read; the target lacks only the last of them.
            draft_length: γ, the number of tokens to draft.
            sampling: The settings to draw tokens with; None takes the most likely ones.

        Returns:
            The draft and its verification; None where this pair, draft or context cannot run as one round.
        """
        drafter = self._drafter
        # A token that the target lacks must not reach its embedding.
        if drafter.gpu.stream is not target.gpu.stream or drafter.manifest.vocab_size > target.manifest.vocab_size:
            return None
        unread, end = len(token_ids), drafter.length + len(token_ids) + draft_length - 1
        if target.length + draft_length >= target.capacity or end > drafter.capacity:
            return None
        token_ids = drafter.catch_up(token_ids)
        unread = len(token_ids)
        if not drafter.knows(target, unread):
            return None
        kept_round = self._round(target, unread, draft_length, sampling)
        speculation = kept_round.run(token_ids, target.length, sampling)
        target.length += draft_length + 1
        drafter.length = end
        return speculation

    def close(self) -> None:
        """Free the rounds' graphs and events, once."""
        for each in self.kept.values():
            each.close()
        self.kept.clear()
        self.samplers.clear()

    def _round(
        self, target: "OnnxRuntimeCudaEngine", unread: int, draft_length: int, sampling: Sampling | None
    ) -> CudaRound:
        sampler = self._sampler(target, draft_length, sampling.params) if sampling else None
        key = target, unread, sampler or draft_length
        kept_round = self.kept.pop(key, None) or CudaRound(target, self._drafter, unread, draft_length, sampler)
        self.kept[key] = kept_round  # moves it to the end
        if len(self.kept) > _KEPT_ROUNDS:
            self.kept.pop(next(iter(self.kept))).close()
            used = {choice for _, _, choice in self.kept}
            self.samplers = {key: each for key, each in self.samplers.items() if each in used}
        return kept_round

    def _sampler(self, target: "OnnxRuntimeCudaEngine", draft_length: int, params: SamplingParams) -> DeviceSampler:
        key = target, draft_length, params.top_k, params.top_p < 1, params.min_p > 0
        if key not in self.samplers:
            self.samplers[key] = DeviceSampler(target, self._drafter, *key[1:])
        return self.samplers[key]
