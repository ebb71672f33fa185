"""`--format sglang-token-map`: the file that SGLang's `--speculative-token-map` reads."""

from pathlib import Path

import torch

from engines.errors import VocabtrimError
from vocabtrim_export.formats.exported import Exported

MAP_NAME = "hot_token_ids.pt"


def write(exported: Exported, directory: Path) -> None:
    """Write the kept tokens' absolute ids, ascending, in PyTorch's format, the only one that SGLang takes.

    SGLang opens the file with `weights_only=True` and cuts the head of an EAGLE-2 drafter by it when it loads.

    Raises:
        VocabtrimError: Nothing was trimmed, so there is no map.
    """
    if exported.vocab_map is None:
        raise VocabtrimError("--format sglang-token-map: --k keeps every token, so there is no map: give a smaller --k")
    torch.save(exported.vocab_map.kept_token_ids.tolist(), directory / MAP_NAME)
