"""`--format triton`: a Triton Inference Server model repository with drafter and target, for its ONNX Runtime backend.

Each model keeps its KV cache on the server, as the implicit state of a sequence: a client sends token ids and lengths,
and gets token ids or logits. To forget tokens it sends a shorter `seqlens_k`; no data moves.
"""

from collections.abc import Mapping
from pathlib import Path

import onnx

from engines.bundle.graph_io import PAST, PRESENT, present_name
from engines.bundle.manifest import MODEL_NAME, WEIGHTS_NAME, Manifest
from vocabtrim_export.formats.exported import Exported, copy_tokenizer
from vocabtrim_export.lowering.graph_files import clone_file

CONFIG_NAME = "config.pbtxt"
_TYPES: Mapping[int, str] = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.BFLOAT16: "TYPE_BF16",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.INT64: "TYPE_INT64",
}


def write(exported: Exported, directory: Path) -> None:
    """Write `drafter/1/model.onnx` and, with a target, `target/1/model.onnx`, each with its `config.pbtxt`."""
    for role, bundle in exported.bundles.items():
        place = directory / role
        (place / "1").mkdir(parents=True)
        for name in (MODEL_NAME, WEIGHTS_NAME):
            clone_file(bundle / name, place / "1" / name)
        (place / "tokenizer").mkdir()
        copy_tokenizer(exported, role, place / "tokenizer")
        graph = onnx.load(bundle / MODEL_NAME, load_external_data=False).graph
        (place / CONFIG_NAME).write_text(_config(role, graph, exported.manifests[role]), "utf-8")


def _config(name: str, graph: onnx.GraphProto, manifest: Manifest) -> str:
    """Returns the text of `config.pbtxt`.

    Dimensions are written in full, as `max_batch_size: 0` means; a symbolic one is -1, that of the KV cache its
    capacity.
    """
    sizes = {"capacity": manifest.context_length}
    not_fed = {tensor.name for tensor in graph.initializer}
    fed = [value for value in graph.input if value.name not in not_fed]
    inputs = [_tensor(value, sizes) for value in fed if not value.name.startswith(PAST)]
    outputs = [_tensor(value, sizes) for value in graph.output if not value.name.startswith(PRESENT)]
    states = [_state(value, sizes) for value in fed if value.name.startswith(PAST)]
    return f"""# {name}: written by vocabtrim-export
name: "{name}"
backend: "onnxruntime"
default_model_filename: "{MODEL_NAME}"
max_batch_size: 0
{_list("input", inputs)}
{_list("output", outputs)}
sequence_batching {{
  max_sequence_idle_microseconds: 60000000
  direct {{ }}
{_list("state", states)}
}}
"""


def _list(name: str, entries: list[str]) -> str:
    return f"{name} [\n" + ",\n".join(f"  {{ {entry} }}" for entry in entries) + "\n]"


def _tensor(value: onnx.ValueInfoProto, sizes: dict[str, int]) -> str:
    return f'name: "{value.name}" {_form(value, sizes)}'


def _state(value: onnx.ValueInfoProto, sizes: dict[str, int]) -> str:
    form, after = _form(value, sizes), present_name(value.name)
    # the cache starts as zeros, at its full size; attention reads no more of it than seqlens_k says
    return (
        f'input_name: "{value.name}" output_name: "{after}" {form} '
        f'initial_state {{ name: "empty" zero_data: true {form} }}'
    )


def _form(value: onnx.ValueInfoProto, sizes: dict[str, int]) -> str:
    tensor = value.type.tensor_type
    dims = [dim.dim_value or sizes.get(dim.dim_param, -1) for dim in tensor.shape.dim]
    return f"data_type: {_TYPES[tensor.elem_type]} dims: {dims}"
