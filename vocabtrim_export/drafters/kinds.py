"""Every kind of head that an export can load as a drafter. A new kind is a module in this folder and an entry here.

`vocabtrim_export.sources.head_kind` tells which kind a MODEL is, without importing torch.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

from engines.bundle.manifest import Kind
from vocabtrim_export.drafters.eagle_checkpoint import load_head
from vocabtrim_export.drafters.medusa import load_medusa
from vocabtrim_export.drafters.mtp import find_mtp, load_mtp
from vocabtrim_export.drafters.source import HeadSource
from vocabtrim_export.sources.source import Source

LoadHead: TypeAlias = Callable[[Source], HeadSource]  # loads a head for its loaded target

# kind → (MODEL of the drafter, MODEL of the target) → what loads the head. The function reads headers only: it refuses
# what cannot be exported before the target is loaded.
FIND_HEAD: Mapping[Kind, Callable[[str, str], LoadHead]] = {
    "eagle": lambda drafter, _target: partial(load_head, drafter),
    "eagle3": lambda drafter, _target: partial(load_head, drafter),
    "medusa": lambda drafter, _target: partial(load_medusa, drafter),
    "mtp": lambda _drafter, target: partial(load_mtp, find_mtp(target)),
}
