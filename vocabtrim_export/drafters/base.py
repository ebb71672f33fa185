"""`FeatureHead`: what all heads that read a target's hidden states have in common."""

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import (
    LlamaPreTrainedModel,
)


class FeatureHead(LlamaPreTrainedModel):
    """Row t reads token t + 1 and a hidden state made of the target's features of token t; it predicts token t + 2. A
    row that the head drafts itself reads the hidden state that the row before gives."""

    lm_head: nn.Linear

    @property
    def fuse(self) -> nn.Linear | None:
        """What makes a hidden state of the features; None where they are one."""
        return None

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor, position_ids: Tensor, hidden: Tensor) -> CausalLMOutput:
        """input_ids, position_ids: int64[1, S], hidden: [1, S, hidden] → logits [1, S, head_rows], and as
        hidden_states [1, S, hidden] what the next draft step reads."""
        raise NotImplementedError
