"""TensorRT's view of a graph: the parsed layers, and the kernels that it built for them."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.errors import VocabtrimError

NETWORK_NAME = "network.json"
DRAFT_NETWORK_NAME = "draft_network.json"
_FORMAT = 1
_PARSERS_OWN = ("ONNXTRT_", "(Unnamed Layer")
_PLUMBING = ("CAST", "CONSTANT", "SHUFFLE", "SQUEEZE", "UNSQUEEZE")
_KERNEL = re.compile(r"\W*Name: (?P<name>[^{}]+?), LayerType: (?P<type>\w+), ")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True, slots=True)
class NetworkTensor:
    """A tensor of the parsed network.

    Attributes:
        name: Its name.
        dtype: TensorRT's name of its type, such as "HALF".
        shape: Its sizes; -1 for a dynamic dimension.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the parsed network.

    Attributes:
        name: Its name.
        type: TensorRT's name of its kind, such as "KV_CACHE_UPDATE".
        inputs: The tensors that it reads.
        outputs: The tensors that it computes.
    """

    name: str
    type: str
    inputs: tuple[NetworkTensor, ...]
    outputs: tuple[NetworkTensor, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A layer of the built plan.

    Attributes:
        name: Its name.
        type: The compiler's name of its kind, "gemm" or "kgen" (a generated kernel).
        nodes: The ONNX nodes that it computes. A node may be split over several kernels.
    """

    name: str
    type: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Network:
    """The layers and kernels of one plan, the content of a bundle's `network.json`.

    Attributes:
        layers: The layers of the parsed network.
        kernels: The kernels that the builder listed, one optimization profile after the other; empty where it listed
            none.
    """

    layers: tuple[Layer, ...]
    kernels: tuple[Kernel, ...]

    def counts(self) -> dict[str, int]:
        """Returns the number of parsed layers of each type, the most frequent first."""
        return dict(Counter(layer.type for layer in self.layers).most_common())

    def to_json(self) -> str:
        """Returns the text of `network.json`.

        Every tensor is written once and referred to by its index, because an unrolled graph has thousands of them.
        """
        tensors: dict[NetworkTensor, int] = {}

        def indices(of: Sequence[NetworkTensor]) -> list[int]:
            return [tensors.setdefault(tensor, len(tensors)) for tensor in of]

        layers = [[layer.name, layer.type, indices(layer.inputs), indices(layer.outputs)] for layer in self.layers]
        data = {
            "format": _FORMAT,
            "tensors": [[tensor.name, tensor.dtype, tensor.shape] for tensor in tensors],
            "layers": layers,
            "kernels": [[kernel.name, kernel.type, kernel.nodes] for kernel in self.kernels],
        }
        return json.dumps(data, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Network":
        """Read the text of a `network.json`.

        Args:
            text: The file's text.
            where: The file's name, for errors.

        Raises:
            VocabtrimError: The text does not describe a network.
        """
        try:
            data = json.loads(text)
            if data["format"] != _FORMAT:
                raise VocabtrimError(f"{where} has format {data['format']}, not {_FORMAT}: export the bundle again")
            tensors = [NetworkTensor(name, dtype, tuple(shape)) for name, dtype, shape in data["tensors"]]
            layers = tuple(
                Layer(name, type_, tuple(tensors[i] for i in inputs), tuple(tensors[i] for i in outputs))
                for name, type_, inputs, outputs in data["layers"]
            )
            kernels = tuple(Kernel(name, type_, tuple(nodes)) for name, type_, nodes in data["kernels"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise VocabtrimError(f"{where} does not describe a network ({error}): export the bundle again") from error
        return cls(layers, kernels)


def describe_network(network: Any) -> tuple[Layer, ...]:
    """Describe the layers of a TensorRT `INetworkDefinition`, in its order.

    Layers that the parser adds to change a tensor's type or rank or to hold a number are left out. A layer that reads
    the output of such a layer is described as reading the tensor before it, in the shape that the layer sees.
    """
    outputs = {network.get_output(index).name for index in range(network.num_outputs)}
    before: dict[str, str] = {}
    layers = []
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        inputs = _tensors((layer.get_input(index) for index in range(layer.num_inputs)), before)
        results = _tensors((layer.get_output(index) for index in range(layer.num_outputs)), {})
        if _is_plumbing(layer) and results[0].name not in outputs:
            before.update((results[0].name, tensor.name) for tensor in inputs[:1])
        else:
            layers.append(Layer(layer.name, layer.type.name, inputs, results))
    return tuple(layers)


def parse_kernels(lines: Iterable[str]) -> tuple[Kernel, ...]:
    """Parse the kernels that a builder of detailed profiling verbosity lists in its log.

    Args:
        lines: The log. A kernel's line is "Name: …, LayerType: …, Inputs: […], …, Metadata: [ONNX Layer: …][ONNX
            Layer: …]"; other lines are skipped.
    """
    kernels = []
    for line in lines:
        if match := _KERNEL.match(line):
            kernels.append(Kernel(match["name"], match["type"], tuple(_NODE.findall(line))))
    return tuple(kernels)


def _is_plumbing(layer: Any) -> bool:
    return layer.name.startswith(_PARSERS_OWN) and layer.type.name in _PLUMBING


def _tensors(tensors: Iterable[Any], before: Mapping[str, str]) -> tuple[NetworkTensor, ...]:
    """Describe the tensors of a layer, without the None that stands for an optional input."""
    return tuple(
        NetworkTensor(before.get(tensor.name, tensor.name), tensor.dtype.name, tuple(tensor.shape))
        for tensor in tensors
        if tensor is not None
    )
