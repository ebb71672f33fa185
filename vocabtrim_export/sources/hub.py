"""Models by their hub id: a local copy of their files, or a refusal within seconds."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from engines.errors import VocabtrimError

_SECONDS = 5.0  # for the hub's first answer
_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_OTHERS = ["original/*", "onnx/*", "openvino/*", "consolidated*"]  # copies of the weights in other layouts


def fetch(spec: str) -> Path:
    """Fetch a hub model's files, or take them from the cache where the hub does not answer.

    Args:
        spec: The model's id, such as "HuggingFaceTB/SmolLM2-135M".

    Returns:
        The snapshot's directory in the local cache.

    Raises:
        VocabtrimError: There is no such model, it may not be read, or the hub does not answer and the cache lacks it.
    """
    try:
        commit = HfApi().model_info(spec, timeout=_SECONDS).sha
    except GatedRepoError as error:
        raise VocabtrimError(f"{spec} is gated: accept its licence on the hub and run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise VocabtrimError(f"the hub has no model {spec}, or it is private: run `hf auth login`") from error
    except HFValidationError as error:
        raise VocabtrimError(f"no model at {spec}: it is neither a path that exists nor a hub id") from error
    except Exception as error:  # no network, a proxy's answer, offline mode: each client has its own kinds
        return _cached(spec, error)
    return Path(snapshot_download(spec, revision=commit, allow_patterns=_FILES, ignore_patterns=_OTHERS))


def _cached(spec: str, error: Exception) -> Path:
    try:
        return Path(snapshot_download(spec, allow_patterns=_FILES, ignore_patterns=_OTHERS, local_files_only=True))
    except LocalEntryNotFoundError:
        raise VocabtrimError(
            f"cannot load {spec}: the hub does not answer, and the model is not in its cache; give a local directory"
        ) from error
