"""`ModelFacts`: what a calibration must know of the model that generates, wherever that is."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a calibration must know of the model that generates.

    Attributes:
        rows: Rows of its head, padding included.
        context: Tokens that it can read at most; None where its config does not say.
        dtype: The dtype that it samples in, "bfloat16".
    """

    rows: int
    context: int | None
    dtype: str

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "ModelFacts":
        """Read them from a model's config."""
        config = model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        return cls(config.vocab_size, context, str(model.dtype).removeprefix("torch."))
