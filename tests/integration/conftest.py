"""Small random models of every architecture, saved as users have them, and what is exported from them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from engines import load_engine
from engines.bundle.tokenizer import tokenizer_digest
from vocabtrim_export.calibration import TokenCounts
from vocabtrim_export.calibration.counting import CalibrationSettings
from vocabtrim_export.pipeline import ExportSettings, export
from vocabtrim_export.selection import Coverage

from .eagle_heads import CONFIG

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


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory, tokenizer):
    """random_model("llama", **changes) → the directory of a model with random weights and the tests' tokenizer."""

    def make(architecture: str, seed: int = 0, **changes) -> Path:
        path = tmp_path_factory.mktemp(architecture)
        settings = SHARED | ARCHITECTURES.get(architecture, {}) | changes
        if architecture == "gpt2":
            settings = {k: v for k, v in settings.items() if k not in ("max_position_embeddings", "num_hidden_layers")}
        config = transformers.AutoConfig.for_model(architecture, **settings)
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():  # norms and biases start as ones and zeros, which hide mistakes
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def count_file(tmp_path_factory):
    """count_file(model directory) → a file of token counts for its tokenizer: no calibration needs to run."""

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
def export_pair(tmp_path_factory, count_file):
    """export_pair(model, target, k=192, …) → ExportResult; without a target, of the model as its own drafter."""

    def run(model: Path, target: Path | None = None, k: int | Coverage = 192, **changes):
        calibration = CalibrationSettings(calibration=(count_file(target or model),))
        settings = ExportSettings(**{"k": k, "max_length": 128, "calibration": calibration} | changes)
        return export(str(model), str(target or model), tmp_path_factory.mktemp("out") / "bundles", settings)

    return run


@pytest.fixture(scope="session")
def write_head(tmp_path_factory):
    """write_head(tensors, **changes of config.json) → the directory of a head."""

    def write(tensors, config=CONFIG, **changes):
        path = tmp_path_factory.mktemp("head")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config | changes))
        return path

    return write


def check_logits(path: Path, ids: np.ndarray, wanted: np.ndarray, steps: list[tuple[int, int]]) -> None:
    """Feed `ids` to the bundle in `steps` (tokens fed, positions kept) and compare with `wanted`, PyTorch's logits."""
    spread = wanted.std()
    with load_engine(path) as engine:
        columns = slice(None) if engine.vocab_map is None else engine.vocab_map.kept_token_ids
        at = 0
        for fed, keep in steps:
            output = engine.feed(ids[at : at + fed], keep=keep)
            at += fed
            rows = wanted[at - keep : at, columns]
            np.testing.assert_allclose(output.logits, rows, atol=2e-4 * spread, rtol=1e-4)
            best = rows.argmax(-1)
            assert output.token_ids.tolist() == (best if engine.vocab_map is None else columns[best]).tolist()
        engine.rewind(24)  # forgetting moves no data and loses none
        output = engine.feed(ids[24:30], keep=6)
        np.testing.assert_allclose(output.logits, wanted[24:30, columns], atol=2e-4 * spread, rtol=1e-4)
