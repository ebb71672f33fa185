"""Show what a bundle holds: the model, its graphs, its TensorRT plans and the layers that they were built from."""

import argparse
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.bundle.graph_io import PAST, PRESENT
from vocabtrim_export.cli.arguments import add_json_argument
from vocabtrim_export.cli.combinations import refuse_stated
from vocabtrim_export.cli.console import print_table

if TYPE_CHECKING:
    from engines.bundle.read import Bundle, Manifest
    from vocabtrim_export.trt.network import Layer, Network

_CACHE = (PAST, PRESENT)
Graph = dict[str, list[dict[str, Any]]]

EXAMPLE = "--check out/drafter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("bundle", type=Path, metavar="DIR", help="the bundle: a directory that vocabtrim-export wrote")
    parser.add_argument(
        "--layers", action="store_true", help="list every layer that TensorRT parsed, or every node of the ONNX graphs"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check the files against the manifest, and list every check; exit code 2 if one fails",
    )
    add_json_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from engines.bundle.read import read_bundle

    if options.check:
        refuse_stated(options, {"layers": False}, "is not shown by --check: leave one of them out")
        run_checks(options.bundle, options.json)
        return
    bundle = read_bundle(options.bundle)
    graphs, networks = read_graphs(bundle), read_networks(bundle)
    layers = list_layers(bundle, networks) if options.layers else {}
    if options.json:
        print(json.dumps(summary(bundle, graphs, networks, layers), indent=2))
    else:
        _print(bundle, graphs, networks, layers)


def run_checks(path: Path, as_json: bool) -> None:
    """Print every check of a bundle and its result.

    Args:
        path: The bundle.
        as_json: Print JSON instead of a table.

    Raises:
        VocabtrimError: A check failed.
    """
    from rich.markup import escape

    from engines.bundle.read import check_bundle
    from engines.errors import VocabtrimError

    checks = check_bundle(path)
    failed = [check for check in checks if check.wrong is not None]
    if as_json:
        print(json.dumps({"bundle": str(path), "ok": not failed, "checks": [asdict(c) for c in checks]}, indent=2))
    else:
        rows = [[escape(check.name), escape(check.wrong or "ok")] for check in checks]
        print_table(escape(str(path)), ["check", "result"], rows, numbers=False)
    if failed:
        raise VocabtrimError(f"{len(failed)} of {len(checks)} checks failed, first: {failed[0].wrong}")


def read_graphs(bundle: "Bundle") -> dict[str, Graph]:
    """Returns the inputs and outputs of each ONNX file: name, dtype and shape, a dynamic dimension by its name."""
    return {name: {"inputs": _values(graph.input), "outputs": _values(graph.output)} for name, graph in _open(bundle)}


def read_networks(bundle: "Bundle") -> dict[str, "Network"]:
    """Returns the parsed network of each plan by the file that describes it; none for a bundle without plans."""
    from vocabtrim_export.trt.network import DRAFT_NETWORK_NAME, NETWORK_NAME, Network

    paths = [bundle.path / name for name in (NETWORK_NAME, DRAFT_NETWORK_NAME) if name in bundle.manifest.files]
    return {path.name: Network.from_json(path.read_text("utf-8"), str(path)) for path in paths}


def list_layers(bundle: "Bundle", networks: dict[str, "Network"]) -> dict[str, list[dict[str, Any]]]:
    """Returns the layers of each parsed network in order, by file; without networks, the nodes of each graph."""
    if networks:
        return {name: [_layer(layer) for layer in network.layers] for name, network in networks.items()}
    return {
        name: [
            {"name": node.name, "type": node.op_type, "inputs": list(node.input), "outputs": list(node.output)}
            for node in graph.node
        ]
        for name, graph in _open(bundle)
    }


def summary(
    bundle: "Bundle",
    graphs: dict[str, Graph],
    networks: dict[str, "Network"],
    layers: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """Returns the data that `--json` prints: the manifest, and what is read from the bundle's other files."""
    facts: dict[str, Any] = {
        "bundle": str(bundle.path),
        "format": "trt" if bundle.manifest.tensorrt else "onnx",
        "manifest": asdict(bundle.manifest),
        "file_bytes": _sizes(bundle),
        "graphs": graphs,
        "networks": {
            name: {"layers": network.counts(), "kernels": dict(Counter(kernel.type for kernel in network.kernels))}
            for name, network in networks.items()
        },
    }
    return facts | ({"layers": layers} if layers else {})


def _open(bundle: "Bundle") -> list[tuple[str, Any]]:
    """Returns the name and the graph of each ONNX file. Weights, which are most of its bytes, are not loaded."""
    import onnx

    names = sorted((name for name in bundle.manifest.files if name.endswith(".onnx")), reverse=True)
    return [(name, onnx.load(bundle.path / name, load_external_data=False).graph) for name in names]


def _values(values: Any) -> list[dict[str, Any]]:
    import onnx

    return [
        {
            "name": value.name,
            "dtype": onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower(),
            "shape": [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        }
        for value in values
    ]


def _layer(layer: "Layer") -> dict[str, Any]:
    named = {"name": layer.name, "type": layer.type}
    return named | {side: [asdict(tensor) for tensor in getattr(layer, side)] for side in ("inputs", "outputs")}


def _sizes(bundle: "Bundle") -> dict[str, int]:
    return {name: (bundle.path / name).stat().st_size for name in sorted(bundle.manifest.files)}


def _print(
    bundle: "Bundle",
    graphs: dict[str, Graph],
    networks: dict[str, "Network"],
    layers: dict[str, list[dict[str, Any]]],
) -> None:
    from rich.markup import escape  # brackets in a name would be read as markup

    manifest = bundle.manifest
    print_table(escape(str(bundle.path)), ["", "value"], [*map(list, _facts(manifest).items())], numbers=False)
    if manifest.tensorrt is not None:
        rows = [[p.phase, str(p.tokens), str(p.keep), str(p.span)] for p in manifest.tensorrt.profiles]
        print_table("profiles", ["phase", "tokens", "predicted", "slots attended to"], rows)
    for name, graph in graphs.items():
        rows = [[v["name"], side, v["dtype"], _shape(v["shape"])] for side, v in _without_caches(graph)]
        print_table(name, ["tensor", "", "type", "shape"], rows, numbers=False)
    for name, network in networks.items():
        rows = [[type_, str(count)] for type_, count in network.counts().items()]
        rows.append(["kernels built from them", str(len(network.kernels))])
        print_table(name, ["layer", "count"], rows)
    print_table("files", ["name", "bytes"], [[name, f"{size:,}"] for name, size in _sizes(bundle).items()])
    for name, found in layers.items():
        rows = [
            [escape(layer["name"]), layer["type"], _tensors(layer["inputs"]), _tensors(layer["outputs"])]
            for layer in found
        ]
        print_table(f"layers of {name}", ["name", "type", "inputs", "outputs"], rows, numbers=False)


def _facts(manifest: "Manifest") -> dict[str, str]:
    """Returns the most important fields of the manifest in words."""
    share = f"{manifest.head_rows / manifest.vocab_size:.1%}"
    facts = {
        "role": manifest.role,
        "source": f"{manifest.source} ({manifest.architecture}), {manifest.source_digest[:12]}",
        "dtype": manifest.dtype,
        "quantization": manifest.quantization,
        "head rows": f"{manifest.head_rows:,} of {manifest.vocab_size:,} ({share})",
        "kept tokens": f"map {manifest.vocab_map[:12]}" if manifest.vocab_map else "all",
        "slots": f"{manifest.slots} for tokens of the text that are not kept" if manifest.slots else "none",
        "coverage": "unknown" if manifest.coverage is None else f"{manifest.coverage:.2%} of held-out tokens",
        "context length": f"{manifest.context_length:,} tokens",
        "weights per step": f"{manifest.weight_bytes_per_step:,} bytes, of the head {manifest.head_bytes:,}",
        "experts": _experts(manifest),
        "rules": _rules(manifest),
        "KV cache": f"{manifest.kv_bytes_per_token:,} bytes a token",
    }
    plans = manifest.tensorrt
    if plans is None:
        return facts
    library = {"none": "none, only graphs", "tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}[plans.flavor]
    return facts | {
        "plans": f"{library} {plans.version}".strip(),
        "compute capabilities": ", ".join(plans.compute_capabilities) or "none",
        "drafted in one call": f"{plans.draft_length} tokens" if plans.draft_length else "one token",
        "weights": "stripped, taken from the graphs at load" if plans.weights_stripped else "in the plans",
    }


def _without_caches(graph: Graph) -> list[tuple[str, dict[str, Any]]]:
    """Returns (side, tensor) for each input and output; the KV caches of all layers are one entry on each side."""
    shown = []
    for side, values in (("input", graph["inputs"]), ("output", graph["outputs"])):
        caches = [value for value in values if value["name"].startswith(_CACHE)]
        shown += [(side, value) for value in values if value not in caches]
        if caches:
            shown.append((side, caches[0] | {"name": f"{caches[0]['name']} and {len(caches) - 1} more"}))
    return shown


def _shape(shape: list[Any]) -> str:
    return "×".join(str(size) for size in shape) or "scalar"


def _tensors(tensors: list[Any]) -> str:
    """Returns the shapes of a parsed network's tensors, or the names of a graph's, which have no shapes there."""
    return ", ".join(tensor if isinstance(tensor, str) else _shape(tensor["shape"]) for tensor in tensors)


def _experts(manifest: "Manifest") -> str:
    """Returns the experts of a mixture in words."""
    from runtime.measure.expert_reads import ExpertReads

    forms = ", ".join(f"{each.num_experts} a layer, a token picks {each.per_token}" for each in manifest.experts)
    return f"{forms}; {ExpertReads.of(manifest, 5)}" if forms else "none"


def _rules(manifest: "Manifest") -> str:
    """Returns the rules that the bundle applies to logits, and those of the generation config that it does not."""
    rules = manifest.rules
    lacking = f"not applied: {', '.join(rules.unsupported)}" if rules.unsupported else ""
    return "; ".join(filter(None, (rules.applied(), lacking))) or "none"
