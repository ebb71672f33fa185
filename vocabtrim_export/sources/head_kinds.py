"""Every kind of head that can be a drafter: how its checkpoint is recognised, and the module that loads it.

The module imports no torch: the command line asks for the kind of a MODEL before anything is loaded, and `locate`
refuses heads where a language model is needed.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engines.bundle.typed_json import read
from vocabtrim_export.sources.paths import local_path
from vocabtrim_export.sources.weight_files import checkpoint_files, tensor_shapes

FUSING_TENSORS = {"fc.weight", "model.fc.weight", "fusion_fc.weight"}  # no language model has one


@dataclass(frozen=True, slots=True)
class HeadKind:
    """One kind of head.

    Attributes:
        title: The name of such a checkpoint in messages.
        module: A module of `vocabtrim_export.drafters` with `find_head(drafter, target)`. The function gets both
            MODELs, reads headers only, refuses heads that cannot be exported, and returns a function that loads the
            head for its loaded target.
        recognises: Whether a directory with this config.json and tensors of these names holds such a head.
        has_slots: Whether in-context slots can extend its LM head.
        in_target: The head is part of its target's checkpoint; as a MODEL it is given by its kind's name.
    """

    title: str
    module: str
    recognises: Callable[[Mapping[str, Any], Collection[str]], bool] = lambda _config, _tensors: False
    has_slots: bool = True
    in_target: bool = False


def head_kind(spec: str) -> str | None:
    """Tell whether MODEL is a head, and of which kind.

    Some heads' config.json describes a plain Llama; these are recognised by the names of their tensors.

    Args:
        spec: MODEL as the user gave it: the name of a kind, such as "mtp", or a directory; a hub id is not looked up.

    Returns:
        The kind, a key of `HEAD_KINDS`; None for anything else.
    """
    if spec in HEAD_KINDS and HEAD_KINDS[spec].in_target:
        return spec
    directory = local_path(spec)
    if not (directory / "config.json").is_file():
        return None
    config = read(directory / "config.json")
    if not isinstance(config, dict):
        return None
    names = [name for file in checkpoint_files(directory) for name in tensor_shapes(file)]
    return next((name for name, kind in HEAD_KINDS.items() if kind.recognises(config, names)), None)


def eagle_kind(config: Mapping[str, Any], tensors: Iterable[str]) -> Literal["eagle", "eagle3"]:
    """Tell EAGLE-3 heads from those of EAGLE-1 and EAGLE-2, which are alike.

    Args:
        config: The head's config.json.
        tensors: The names of the tensors in its checkpoint.
    """
    is_third = any("eagle3" in name for name in _stated_kinds(config))
    return "eagle3" if is_third or any(name.endswith(".hidden_norm.weight") for name in tensors) else "eagle"


def _is_eagle(config: Mapping[str, Any], tensors: Collection[str]) -> bool:
    return any("eagle" in name for name in _stated_kinds(config)) or not FUSING_TENSORS.isdisjoint(tensors)


def _is_medusa(config: Mapping[str, Any], _tensors: Collection[str]) -> bool:
    """Returns whether a config.json is that of Medusa heads alone, not of a model that was trained with its heads."""
    return "medusa_num_heads" in config and not any("causallm" in name for name in _stated_kinds(config))


def _stated_kinds(config: Mapping[str, Any]) -> list[str]:
    """Returns the names, in lower case, that a config.json gives its model."""
    architectures = config.get("architectures")
    names = [*(architectures if isinstance(architectures, list) else []), config.get("speculators_model_type")]
    return [str(name).lower() for name in names]


# A new kind is a module of `vocabtrim_export.drafters` and a line here. The first one to recognise a checkpoint wins.
HEAD_KINDS: Mapping[str, HeadKind] = {
    "mtp": HeadKind("a multi-token-prediction layer", "mtp", in_target=True),
    "medusa": HeadKind("Medusa heads", "medusa", _is_medusa, has_slots=False),
    "eagle3": HeadKind(
        "an EAGLE-3 head", "eagle_checkpoint", lambda c, t: _is_eagle(c, t) and eagle_kind(c, t) == "eagle3"
    ),
    "eagle": HeadKind("an EAGLE head", "eagle_checkpoint", _is_eagle),
}
