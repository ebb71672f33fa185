"""Fixtures for all tests: small random models, heads for them, and the bundles that are exported from them.

A model or an export is made once in a run of the tests, whichever module or worker of pytest-xdist asks first, and kept
under a digest of what it was made from. Every caller gets a copy of its own and may change it.
"""

import fcntl
import functools
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

SHARED = {
    "vocab_size": 448,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "head_dim": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# model type → the features of the architecture that a small random model must show
ARCHITECTURES = {
    "llama": {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "attention_bias": True},
    "qwen2": {"tie_word_embeddings": False, "rope_parameters": YARN},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 5},
    "gemma2": {**WINDOWS, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    "gemma3_text": {**WINDOWS, "query_pre_attn_scalar": 24},
    "phi3": {"partial_rotary_factor": 0.5, "head_dim": 32, "hidden_size": 128},
    "phi": {"partial_rotary_factor": 0.5, "hidden_size": 128},  # a head with a bias
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "cohere": {"logit_scale": 0.25},  # rotates pairs, not halves
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256, "scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {"rotary_pct": 0.5, "hidden_size": 128, "use_parallel_residual": True},
}
# mixtures of experts, which TensorRT does not take: shared experts with weights that add up to less than one, and a
# window that only the mask states; attention sinks, a clamped gate by turns, and biases
_EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4}
MIXTURES = {
    "qwen2_moe": {
        **{**_EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
        **{"use_sliding_window": True, "sliding_window": 5, "layer_types": WINDOWS["layer_types"]},
    },
    "gpt_oss": {**WINDOWS, **_EXPERTS, "swiglu_limit": 2.0, "rope_parameters": {"rope_type": "default"}},
}
# ALiBi, which TensorRT does not get: six heads, whose slopes are of two kinds; one key for all heads; clipped products
ALIBI = {
    "bloom": {"hidden_size": 96, "n_head": 6, "n_layer": 2},
    "falcon": {"alibi": True, "multi_query": True, "parallel_attn": False, "bias": True},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "attn_config": {"clip_qkv": 1.0}},
}


class Store:
    """Directories by what they were made from, shared by all processes of one run of the tests."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)

    def once(self, key: object, make: Callable[[Path], Any]) -> tuple[Path, Any]:
        """Return the directory that `make` filled, and what it returned. The first caller with this `key` makes it."""
        place = self.root / hashlib.sha256(repr(key).encode()).hexdigest()[:32]
        result = place / "result"
        with place.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not result.exists():
                shutil.rmtree(place, ignore_errors=True)  # left by a `make` that raised
                (place / "files").mkdir(parents=True)
                made = make(place / "files")
                result.write_bytes(pickle.dumps(made))
        return place / "files", pickle.loads(result.read_bytes())


def copy_tree(source: Path, place: Path) -> Path:
    """Copy a directory. A file with several names in it has them in the copy too, so that tests see hard links."""
    copies: dict[int, str] = {}

    def copy(original: str, to: str) -> None:
        first = copies.setdefault(os.stat(original).st_ino, to)
        if first == to:
            shutil.copy2(original, to)
        else:
            os.link(first, to)

    return shutil.copytree(source, place, copy_function=copy)


def content_digest(path: Path | str) -> str:
    """A digest of the files in a directory; `path` itself where it is none, such as "mtp"."""
    if not Path(path).is_dir():
        return str(path)
    sha = hashlib.sha256()
    for file in sorted(each for each in Path(path).rglob("*") if each.is_file()):
        data = file.read_bytes()
        sha.update(f"{file.relative_to(path)} {len(data)}\n".encode())
        sha.update(data)
    return sha.hexdigest()


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    return Store((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "store")


@pytest.fixture(scope="session")
def traced_once():
    """Trace each skeleton once in a process: tracing is nine tenths of a small export and reads no weights.

    PyTorch's table of ONNX operators, a third of a small trace, is read once as well.
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    from vocabtrim_export.tracing import trace

    real, graphs = trace._trace_skeleton, {}

    def trace_skeleton(model, modeling, dtype, parts, feature_layers):
        config = {name: value for name, value in trace._config_of(model).to_dict().items() if name != "_name_or_path"}
        tables = [(name, tuple(table.shape)) for name, table in parts.rope.named_buffers()] if parts.rope else None
        key = repr((type(model), config, dtype, parts.norms, parts.experts, tables, list(feature_layers)))
        if key not in graphs:
            graphs[key] = real(model, modeling, dtype, parts, feature_layers)
        return graphs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "_trace_skeleton", trace_skeleton)
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session")
def random_model(tmp_path_factory, tokenizer, store, traced_once):
    """random_model("llama", **changes) → the directory of a model with random weights and the tests' tokenizer."""
    import torch
    import transformers

    def write(path: Path, architecture: str, seed: int, changes: dict[str, Any]) -> None:
        settings = SHARED | (ARCHITECTURES | MIXTURES | ALIBI).get(architecture, {}) | changes
        if architecture == "gpt2":
            settings = {k: v for k, v in settings.items() if k not in ("max_position_embeddings", "num_hidden_layers")}
        config = transformers.AutoConfig.for_model(architecture, **settings)
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():  # norms and biases start as ones and zeros, which hide mistakes
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 or name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)

    def make(architecture: str, seed: int = 0, **changes) -> Path:
        key = ("model", architecture, seed, sorted(changes.items()))
        made, _ = store.once(key, lambda path: write(path, architecture, seed, changes))
        return shutil.copytree(made, tmp_path_factory.mktemp(architecture), dirs_exist_ok=True)

    return make


@pytest.fixture(scope="session")
def count_file(tmp_path_factory):
    """count_file(model directory) → a file of token counts for its tokenizer: no calibration needs to run."""
    import numpy as np
    import transformers

    from engines.bundle.tokenizer import tokenizer_digest
    from vocabtrim_export.calibration import TokenCounts

    def make(model: Path) -> Path:
        # transformers adds the special tokens of some architectures to a tokenizer it loads for them
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        numbers = np.random.default_rng(0).permutation(448)
        numbers[len(tokenizer) :] = 0
        path = tmp_path_factory.mktemp("counts") / "counts.safetensors"
        TokenCounts(numbers, numbers, tokenizer_digest(tokenizer.backend_tokenizer), ()).save(path)
        return path

    return make


@pytest.fixture(scope="session")
def export_pair(tmp_path_factory, count_file, store, traced_once):
    """export_pair(model, target, k=192, …) → ExportResult; without a target, of the model as its own drafter."""
    from vocabtrim_export.calibration.counting import CalibrationSettings
    from vocabtrim_export.pipeline import export
    from vocabtrim_export.settings import ExportSettings

    def run(model: Path, target: Path | None = None, k: Any = 192, **changes):
        wanted = {"k": k, "max_length": 128} | changes

        def make(path: Path):
            calibration = {"calibration": CalibrationSettings(calibration=(count_file(target or model),))}
            return export(str(model), str(target or model), path, ExportSettings(**calibration | wanted))

        own = target is None or Path(target) == Path(model)
        key = ("export", content_digest(model), own or content_digest(target), sorted(wanted.items()))
        made, result = store.once(key, make)
        output = copy_tree(made, tmp_path_factory.mktemp("out") / "bundles")

        def copied(path: Path) -> Path:
            return output / path.relative_to(made)

        formats = tuple(copied(path) for path in result.formats)
        return replace(result, drafter=copied(result.drafter), target=copied(result.target), formats=formats)

    return run


@pytest.fixture(scope="session")
def pair(random_model, export_pair):
    """The bundles of a Llama that drafts for itself, shared by the modules that only read them."""
    return export_pair(random_model("llama"))


@pytest.fixture(scope="session")
def write_head(tmp_path_factory):
    """write_head(tensors, **changes of config.json) → the directory of a head."""
    from safetensors.torch import save_file

    from tests.integration.eagle_heads import CONFIG

    def write(tensors, config=CONFIG, **changes):
        path = tmp_path_factory.mktemp("head")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config | changes))
        return path

    return write
