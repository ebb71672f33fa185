"""`--format openvino`: both models in OpenVINO's own files, as OpenVINO GenAI's pipelines open them."""

import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from engines.bundle.manifest import MODEL_NAME, Role
from engines.errors import VocabtrimError
from vocabtrim_export.formats.exported import Exported
from vocabtrim_export.formats.masked import check_widths, write_masked

GRAPH_NAME = "openvino_model.xml"
_BIAS = 10  # the input of GroupQueryAttention for biases of attention; the next is for sinks
_TOKENIZER_NAMES = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")


def write(exported: Exported, directory: Path) -> None:
    """Write `target` and `drafter`: a stateful graph, the tokenizer as graphs, and two config files in each directory.

    Logits of a trimmed head are scattered into a full row, because GenAI's draft models share the target's vocabulary.

    Raises:
        VocabtrimError: The drafter has more tokens than its target, or attention windows or caps would be lost.
    """
    check_widths(exported, "openvino")
    for role, bundle in exported.bundles.items():
        _check_attention(bundle / MODEL_NAME, exported.manifests[role].context_length)
    for role in exported.bundles:
        (directory / role).mkdir()
        _write_graph(exported, role, directory / role)
        _write_tokenizer(exported, directory / role)
        _write_configs(exported, role, directory / role)


def _check_attention(graph: Path, context: int) -> None:
    for node in onnx.load(graph, load_external_data=False).graph.node:
        numbers = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "GroupQueryAttention" and 0 < (window := numbers.get("local_window_size", -1)) < context:
            raise VocabtrimError(
                f"--format openvino: the model attends to a window of {window} tokens, which OpenVINO GenAI would not "
                f"keep to: give --max-length {window}"
            )
        if node.op_type == "GroupQueryAttention" and any(node.input[_BIAS:]):
            raise VocabtrimError("--format openvino: the model has ALiBi positions or attention sinks, which it lacks")
        if node.op_type == "GroupQueryAttention" and numbers.get("softcap", 0):
            raise VocabtrimError(
                "--format openvino: the model caps its attention scores, which OpenVINO does not do: leave openvino out"
            )


def _write_graph(exported: Exported, role: Role, directory: Path) -> None:
    import openvino

    from vocabtrim_export.formats.openvino_graph import stateful

    width = exported.manifests["target"].vocab_size
    with tempfile.TemporaryDirectory(dir=directory) as masked:
        write_masked(exported.bundles[role], Path(masked), exported.manifests[role].vocab_size, width)
        _free_batch(Path(masked) / MODEL_NAME)
        model = stateful(openvino.Core().read_model(Path(masked) / MODEL_NAME))
        openvino.save_model(model, directory / GRAPH_NAME, compress_to_fp16=False)
        del model  # it maps the weights in the temporary directory


def _free_batch(path: Path) -> None:
    """Make the batch dimension dynamic. OpenVINO would otherwise constant-fold the 1 into computed shapes.

    Models are traced with a batch of 1, and their own code reshapes to it. Those reshapes then take the batch of the
    input.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del graph.value_info[:]
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {
        n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant" and n.attribute[0].t.dims
    }
    for node in graph.node:
        if node.op_type == "Reshape" and (stored := constants.get(node.input[1])) is not None:
            shape = numpy_helper.to_array(stored, str(path.parent)).tolist()
            if len(shape) > 2 and shape[0] == 1 and 0 not in shape:
                node.input[1] = f"{node.output[0]}.shape"
                graph.initializer.append(numpy_helper.from_array(np.array([0, *shape[1:]]), node.input[1]))
                del node.attribute[:]  # allowzero, which would make a 0 a size
    onnx.save(model, path)


def _write_tokenizer(exported: Exported, directory: Path) -> None:
    """Write the target's tokenizer, which is the drafter's as well."""
    import openvino
    from openvino_tokenizers import convert_tokenizer

    graphs = convert_tokenizer(exported.sources["target"].tokenizer, with_detokenizer=True)
    for name, graph in zip(_TOKENIZER_NAMES, graphs, strict=True):
        openvino.save_model(graph, directory / name)


def _write_configs(exported: Exported, role: Role, directory: Path) -> None:
    exported.sources[role].model.config.save_pretrained(directory)
    tokenizer = exported.sources["target"].tokenizer
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": list(exported.manifests["target"].eos_token_ids),
        "pad_token_id": tokenizer.pad_token_id,
    }
    stated = {name: value for name, value in ids.items() if value not in (None, [])}
    (directory / "generation_config.json").write_text(json.dumps(stated, indent=2) + "\n", "utf-8")
