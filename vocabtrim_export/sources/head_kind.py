"""Which kind of head a checkpoint holds: told by its config.json and the names of its tensors, before anything is read.

The readers of each kind are in `vocabtrim_export.drafters`; `locate` refuses heads where a language model is needed.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from engines.bundle.manifest import Kind
from engines.bundle.typed_json import read
from vocabtrim_export.sources.weight_files import tensor_shapes

MTP = "mtp"  # as a MODEL: the multi-token-prediction layer of the target
FUSING_TENSORS = {"fc.weight", "model.fc.weight", "fusion_fc.weight"}  # no language model has one


def head_kind(spec: str) -> Kind | None:
    """Tell whether MODEL is a head, and of which kind.

    Some heads' config.json describes a plain Llama; these are recognised by the names of their tensors.

    Args:
        spec: MODEL as the user gave it: "mtp", or a directory; a hub id is not looked up.

    Returns:
        The kind of head, or None for anything else.
    """
    if spec == MTP:
        return "mtp"
    directory = Path(spec).expanduser()
    if not (directory / "config.json").is_file():
        return None
    data = read(directory / "config.json")
    if not isinstance(data, dict):
        return None
    if "medusa_num_heads" in data and not any("causallm" in name for name in _stated_kinds(data)):
        return "medusa"  # a model that has been trained together with its heads may state their number as well
    names = [name for file in directory.glob("*.safetensors") for name in tensor_shapes(file)]
    if any("eagle" in name for name in _stated_kinds(data)) or not FUSING_TENSORS.isdisjoint(names):
        return eagle_kind(data, names)
    return None


def eagle_kind(config: Mapping[str, Any], tensors: Iterable[str]) -> Literal["eagle", "eagle3"]:
    """Tell EAGLE-3 heads from those of EAGLE-1 and EAGLE-2, which are alike.

    Args:
        config: The head's config.json.
        tensors: The names of the tensors in its checkpoint.
    """
    is_third = any("eagle3" in name for name in _stated_kinds(config))
    return "eagle3" if is_third or any(name.endswith(".hidden_norm.weight") for name in tensors) else "eagle"


def _stated_kinds(config: Mapping[str, Any]) -> list[str]:
    """The names, in lower case, by which a config.json calls its model."""
    architectures = config.get("architectures")
    names = [*(architectures if isinstance(architectures, list) else []), config.get("speculators_model_type")]
    return [str(name).lower() for name in names]
