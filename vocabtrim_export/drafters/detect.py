"""Which kind of drafter MODEL is."""

from pathlib import Path

from engines.bundle.manifest import Kind
from engines.bundle.typed_json import read
from vocabtrim_export.drafters.eagle_config import FUSING_TENSORS, eagle_kind, stated_kinds
from vocabtrim_export.sources.weight_files import tensor_shapes

MTP = "mtp"  # as a MODEL: the multi-token-prediction layer of the target


def head_kind(spec: str) -> Kind | None:
    """What head MODEL is, if it is one: `MTP`, or the directory of Medusa heads or an EAGLE head, by its config.json
    or, as some of these describe a mere Llama, by the names of its tensors."""
    if spec == MTP:
        return "mtp"
    directory = Path(spec).expanduser()
    if not (directory / "config.json").is_file():
        return None
    data = read(directory / "config.json")
    if not isinstance(data, dict):
        return None
    if "medusa_num_heads" in data and not any("causallm" in name for name in stated_kinds(data)):
        return "medusa"  # a model that has been trained together with its heads may state their number as well
    names = [name for file in directory.glob("*.safetensors") for name in tensor_shapes(file)]
    if any("eagle" in name for name in stated_kinds(data)) or not FUSING_TENSORS.isdisjoint(names):
        return eagle_kind(data, names)
    return None
