"""Actors of a Ray cluster: each process holds the tokenizer, or the model that generates."""

from dataclasses import dataclass

from vocabtrim_export.calibration.generations import BatchDocuments, BatchTokens, Generator, text_tokens
from vocabtrim_export.calibration.model_facts import ModelFacts
from vocabtrim_export.calibration.relayed_batch import RelayedBatch


@dataclass(frozen=True, slots=True)
class SavedWork:
    """The work on a batch that was saved.

    Attributes:
        number: The number of this handing-out of the batch.
        key: See `PartialBatch`.
        segments: Its segments, packed.
    """

    number: int
    key: str
    segments: tuple[bytes, ...]


class TextWorker:
    """Encodes text; it lives in a process of the cluster.

    Args:
        tokenizer: The library's tokenizer as JSON.
    """

    def __init__(self, tokenizer: str) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(tokenizer)

    def facts(self) -> None:
        """There is no model."""

    def tokens(self, batch: BatchDocuments, _work: None) -> BatchTokens:
        """Returns the tokens of a batch's texts."""
        return text_tokens(self.tokenizer, batch)


class ModelWorker:
    """Generates with a model; it lives in a process of the cluster.

    Args:
        spec: MODEL, as every machine of the cluster finds it.
        seconds: The time between two segments of the work on a batch.
    """

    def __init__(self, spec: str, seconds: float) -> None:
        self.spec, self.seconds = spec, seconds
        self.generator: Generator | None = None
        self.relayed: dict[int, RelayedBatch] = {}

    def facts(self) -> tuple[ModelFacts, str]:
        """Load the model. Returns what a calibration must know of it, and the digest of its weights."""
        import torch

        from vocabtrim_export.sources.precision import calibration_model
        from vocabtrim_export.sources.source import load_source

        source = load_source(self.spec, torch.float32)
        with calibration_model(source.model) as model:
            self.generator = Generator(model, source.tokenizer)
            return ModelFacts.of(model), source.digest

    def tokens(self, batch: BatchDocuments, work: SavedWork | None) -> BatchTokens:
        """Returns the tokens that the model continues a batch's prompts with.

        Args:
            batch: The documents.
            work: The saved work on it; None where it is not saved.
        """
        if self.generator is None:
            self.facts()
        assert self.generator is not None
        if work is None:
            return self.generator.tokens(batch)
        self.relayed[work.number] = RelayedBatch(work.key, work.segments, self.seconds)
        return self.generator.tokens(batch, unfinished=self.relayed[work.number])

    def fetch(self) -> dict[int, list[bytes]]:
        """Returns the segments that were set aside since the last call, by the numbers of their `SavedWork`."""
        return {number: batch.take() for number, batch in list(self.relayed.items())}
