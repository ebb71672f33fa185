"""A model's decoder layers, and what they read while it runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from engines.errors import VocabtrimError


@contextmanager
def layer_inputs(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[Callable[[], list[Tensor]]]:
    """Record the inputs of some decoder layers while `model` runs in the block.

    Args:
        model: The model.
        layers: The layers by index. The number of layers itself stands for the LM head, which reads the output of the
            last layer and the norm after it.

    Yields:
        A function that returns the layers' inputs, [1, S, hidden] each, in the order of `layers`.

    Raises:
        VocabtrimError: The model's layers cannot be found.
    """
    entered: dict[int, Tensor] = {}

    def note(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            entered[index] = inputs[0] if inputs else named["hidden_states"]

        return hook

    handles = []
    if layers:
        modules = [*decoder_layers(model), model.get_output_embeddings()]
        handles = [modules[i].register_forward_pre_hook(note(i), with_kwargs=True) for i in layers]
    try:
        yield lambda: [entered[i] for i in layers]
    finally:
        for handle in handles:
            handle.remove()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Returns the model's decoder layers: the one list of modules that is as long as the model is deep.

    Raises:
        VocabtrimError: There is no such list, or more than one.
    """
    config = model.config.get_text_config()
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList)]
    candidates = [each for each in lists if len(each) == config.num_hidden_layers]
    if len(candidates) != 1:
        raise VocabtrimError(f"a {config.model_type} model has no list of layers that a head could read")
    return candidates[0]
