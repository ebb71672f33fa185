"""`SamplingParams`: how a token is chosen, on the host as on a device."""

import math
from dataclasses import dataclass

import numpy as np

from engines.errors import VocabtrimError

MIN_TEMPERATURE = 1e-5  # below it float32 logits divide to infinity


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen: temperature, then top-k, then top-p, as Hugging Face's warpers apply them.

    temperature: 0 is greedy, whatever the others say. top_k: 0 keeps all. top_p: 1 keeps all.
    seed: of the one random generator of a generation; None takes a fresh one. Raises `VocabtrimError`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf):
            raise VocabtrimError(
                f"temperature is {self.temperature}: give 0 (greedy) or a number of at least {MIN_TEMPERATURE}"
            )
        if self.top_k < 0:
            raise VocabtrimError(f"top_k is {self.top_k}: give the number of tokens to keep, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise VocabtrimError(f"top_p is {self.top_p}: give a probability above 0 and up to 1")
        if self.seed is not None and self.seed < 0:
            raise VocabtrimError(f"seed is {self.seed}: give 0 or more")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Sampling:
    """A generation's parameters, not greedy, with its one random generator."""

    params: SamplingParams
    rng: np.random.Generator
