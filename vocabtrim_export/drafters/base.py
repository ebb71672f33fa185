"""The base classes of heads that read a target's hidden states: `FeatureHead` and `ParallelHeads`.

A kind of head subclasses one of these; the code after loading needs nothing else of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from vocabtrim_export.lowering.lowered import Lowered
from vocabtrim_export.lowering.pipeline import Weights


class FeatureHead(LlamaPreTrainedModel):
    """A head that drafts from its target's hidden states.

    Row t reads token t + 1 and a hidden state that was made of the target's features of token t, and predicts token
    t + 2. A row that the head drafts itself reads the hidden state that the row before it gave.
    """

    lm_head: nn.Linear

    @property
    def fuse(self) -> nn.Linear | None:
        """Returns the product that computes a hidden state from the features.

        It is None where the features are a hidden state already.
        """
        return None

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor, position_ids: Tensor, hidden: Tensor) -> CausalLMOutput:
        """Run the head.

        Args:
            input_ids: int64[1, S].
            position_ids: int64[1, S].
            hidden: [1, S, hidden], in the model's dtype.

        Returns:
            logits: [1, S, head_rows]; hidden_states: [1, S, hidden], what the next draft step reads.
        """
        raise NotImplementedError

    def read_text(self, token_ids: Tensor, features: Tensor) -> None:
        """Read the true rows of a text, then one drafted row after each.

        Calibration measures the layers' inputs meanwhile.

        Args:
            token_ids: int64[1, n].
            features: [1, n, features], the target's, of the same text.
        """
        hidden = features if self.fuse is None else self.fuse(features)
        for step in range(1, 3):
            tokens, hidden = token_ids[:, step:], hidden[:, :-1]
            hidden = self(tokens, torch.arange(tokens.shape[1])[None], hidden).hidden_states


class ParallelHeads(LlamaPreTrainedModel):
    """Several LM heads that draft in parallel from the target's features, with no KV cache: they are not traced.

    From the features of token t, head i predicts token t + i + 2. The configuration holds feature_size, the numbers in
    the features of one token.
    """

    @property
    def lm_heads(self) -> Sequence[nn.Linear]:
        """The product of each head whose rows stand for tokens."""
        raise NotImplementedError

    def get_output_embeddings(self) -> None:
        """Returns None, because there is more than one LM head."""

    def forward(self, features: Tensor) -> Tensor:
        """Run all heads.

        Args:
            features: [1, S, feature_size], in the model's dtype.

        Returns:
            Logits, [1, heads, S, head_rows].
        """
        raise NotImplementedError

    def lower(self, weights: Weights) -> Lowered:
        """Lower to a graph for ONNX Runtime.

        Args:
            weights: The settings for storing the graph's weights, and the kept rows.

        Returns:
            The graph: features: [1, S, feature_size] → logits: [1, heads, S, rows], token_ids: int64[1, heads, S]. One
            call drafts with all heads, so a draft step counts as its share of the bytes that a call reads.
        """
        raise NotImplementedError

    def read_text(self, _token_ids: Tensor, features: Tensor) -> None:
        """Read a text by its features, [1, n, feature_size]; calibration measures the layers' inputs meanwhile."""
        self(features)
