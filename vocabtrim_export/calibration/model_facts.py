"""`ModelFacts`: the facts about a generating model that a calibration needs, in whatever process the model is."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The facts about a generating model that a calibration needs.

    Attributes:
        rows: Rows of its head, padding included.
        context: The most tokens that it can read; None where its config does not state it.
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
