"""What TensorRT made of a graph: the layers it parsed it to and the kernels that it built for them."""

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
    """A tensor of the parsed network. dtype: as TensorRT calls it, such as "HALF". shape: -1 where it is dynamic."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the parsed network. type: as TensorRT calls it, such as "KV_CACHE_UPDATE"."""

    name: str
    type: str
    inputs: tuple[NetworkTensor, ...]
    outputs: tuple[NetworkTensor, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A layer of the built plan. type: the compiler's word for it, "gemm" or "kgen" (generated); nodes: the ONNX nodes
    whose work it does, most of them fused into several kernels."""

    name: str
    type: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Network:
    """One plan, as `network.json` of a bundle keeps it.

    kernels: what the builder said of the plan, one optimization profile after the other; empty where it said nothing.
    """

    layers: tuple[Layer, ...]
    kernels: tuple[Kernel, ...]

    def counts(self) -> dict[str, int]:
        """Number of parsed layers of each type, the most frequent first."""
        return dict(Counter(layer.type for layer in self.layers).most_common())

    def to_json(self) -> str:
        """Every tensor is written once and referred to by its index: an unrolled graph has thousands of them."""
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
        """The inverse of `to_json`; `where` names the file in the error of a malformed one."""
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
    """The layers of a TensorRT `INetworkDefinition`, in its order.

    Without those that the parser puts beside an ONNX node's own to change a tensor's type or rank, or to hold a number:
    a layer that reads the result of one reads, in this description, the tensor before it, in the form it sees.
    """
    outputs = {network.get_output(index).name for index in range(network.num_outputs)}
    before: dict[str, str] = {}
    layers = []
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        inputs = _tensors((layer.get_input(index) for index in range(layer.num_inputs)), before)
        made = _tensors((layer.get_output(index) for index in range(layer.num_outputs)), {})
        if _is_plumbing(layer) and made[0].name not in outputs:
            before.update((made[0].name, tensor.name) for tensor in inputs[:1])
        else:
            layers.append(Layer(layer.name, layer.type.name, inputs, made))
    return tuple(layers)


def parse_kernels(lines: Iterable[str]) -> tuple[Kernel, ...]:
    """The kernels that a builder of detailed profiling verbosity lists in its log, one a line:
    "Name: …, LayerType: …, Inputs: […], …, Metadata: [ONNX Layer: …][ONNX Layer: …]". Other lines are passed over."""
    kernels = []
    for line in lines:
        if found := _KERNEL.match(line):
            kernels.append(Kernel(found["name"], found["type"], tuple(_NODE.findall(line))))
    return tuple(kernels)


def _is_plumbing(layer: Any) -> bool:
    return layer.name.startswith(_PARSERS_OWN) and layer.type.name in _PLUMBING


def _tensors(tensors: Iterable[Any], before: Mapping[str, str]) -> tuple[NetworkTensor, ...]:
    """Layers have optional inputs, which are None."""
    return tuple(
        NetworkTensor(before.get(tensor.name, tensor.name), tensor.dtype.name, tuple(tensor.shape))
        for tensor in tensors
        if tensor is not None
    )
