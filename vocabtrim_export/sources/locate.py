"""Find a model's files: in a local directory, a `.gguf` file, or on the hub."""

from pathlib import Path

from engines.errors import VocabtrimError
from vocabtrim_export.sources.gguf_header import is_part
from vocabtrim_export.sources.head_kinds import head_kind
from vocabtrim_export.sources.hub import fetch
from vocabtrim_export.sources.paths import local_path
from vocabtrim_export.sources.unread_tensors import MERGE
from vocabtrim_export.sources.weight_files import PICKLES, checkpoint_files, pickled


def locate(spec: str) -> tuple[list[Path], str]:
    """Find the files of MODEL; a hub id's are fetched.

    Args:
        spec: MODEL as the user gave it: a directory, a `.gguf` file or a hub id.

    Returns:
        The weight files and the directory they are in.

    Raises:
        VocabtrimError: There is no model at `spec`, or it is of a kind that is not read.
    """
    if "://" in spec:
        hub = "https://huggingface.co/"
        what = f"its hub id, {'/'.join(spec.removeprefix(hub).split('/')[:2])}" if spec.startswith(hub) else "a hub id"
        raise VocabtrimError(f"{spec} is a URL, which is not fetched: give {what}, or download it and give its path")
    path = local_path(spec)
    if path.is_file():
        if path.suffix in PICKLES:
            raise pickled(path)
        if path.suffix != ".gguf":
            raise VocabtrimError(f"{spec} is a file but no .gguf: give the directory that holds config.json")
        return [path], str(path.parent)
    if path.is_dir():
        return _locate_directory(path)
    if spec.count("/") > 1 or spec.startswith((".", "/", "~")) or spec.endswith(".gguf"):
        raise VocabtrimError(f"no model at {spec}: the path does not exist")
    return _locate_directory(fetch(spec))


def _locate_directory(path: Path) -> tuple[list[Path], str]:
    if head_kind(str(path.absolute())):
        raise VocabtrimError(f"{path} is a head and no model: give it as --drafter, with its --target")
    weights = checkpoint_files(path)
    if (path / "adapter_config.json").is_file() or any(path.glob("adapter_*.safetensors")):
        what = "an adapter next to full weights, which would be left out" if weights else "an adapter and no model"
        raise VocabtrimError(f"{path} holds {what}: {MERGE}")
    if (path / "config.json").is_file() and weights:
        return weights, str(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1 or (ggufs and all(map(is_part, ggufs))):
        return ggufs[:1], str(path)
    if ggufs:
        raise VocabtrimError(f"{path} holds {len(ggufs)} .gguf files: name one of them")
    for pickle in sorted(file for file in path.iterdir() if file.suffix in PICKLES):
        raise pickled(pickle)
    if any(path.glob("*.onnx")):
        raise VocabtrimError(
            f"{path} holds an ONNX model: as a --drafter it can be trimmed, here the original weights are needed"
        )
    missing = ".safetensors weights" if (path / "config.json").is_file() else "config.json"
    raise VocabtrimError(f"{path} is not a model directory: it has no {missing}")
