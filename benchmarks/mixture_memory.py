"""Peak memory and seconds of exporting mixtures of experts of several sizes, with random weights made on the spot.

    python benchmarks/mixture_memory.py --layers 1 2 4 --directory DIR > results.jsonl

For each number of layers it writes a checkpoint of Qwen3-30B-A3B's shape (bfloat16, a shard a layer: 1.3 GB for each
layer of 128 experts, and 1.2 GB), exports it with a small drafter of the same vocabulary, lets the two generate
a few tokens, deletes all of it, and prints a line of JSON: what `export_memory.measure` returns. `--experts` makes the
layers smaller; `--quantize int8` exports that instead of int4.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from export_memory import measure
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_VOCAB, _HIDDEN, _SIZE, _HEADS, _KV_HEADS, _HEAD_DIM = 151_936, 2048, 768, 32, 4, 128
_PROMPT = "Once upon a time"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--quantize", choices=("int4", "int8"), default="int4")
    parser.add_argument("--directory", type=Path, required=True, help="it gets 4 GB for a layer, for a while")
    options = parser.parse_args()
    for layers in options.layers:
        figures = _measured(options.directory / "mixture", layers, options.experts, options.quantize)
        print(json.dumps(figures), flush=True)


def _measured(directory: Path, layers: int, experts: int, quantize: str) -> dict[str, Any]:
    directory.mkdir(parents=True)
    try:
        target, drafter, output = (directory / name for name in ("target", "drafter", "output"))
        write_mixture(target, layers, experts)
        write_drafter(drafter)
        pair = ["--drafter", f"{drafter}", "--target", f"{target}", "--output", f"{output}"]
        text = ["--calibration", __file__, "--calibration-source", "text"]
        stored = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        figures = measure([*pair, *text, "--k", "16384", "--quantize", quantize, "--max-length", "1024"])
        generate = ["generate", "--target", f"{output}/target", "--drafter", f"{output}/drafter", "--prompt", _PROMPT]
        code = "from vocabtrim_export.cli.main import main; main()"
        subprocess.run([sys.executable, "-c", code, *generate, "--max-new-tokens", "8"], check=True, stdout=sys.stderr)
        return {"layers": layers, "experts": experts, "quantize": quantize, "checkpoint": stored, **figures}
    finally:
        shutil.rmtree(directory)


def write_mixture(directory: Path, layers: int, experts: int) -> None:
    """Write a checkpoint of Qwen3-30B-A3B's shape but for its numbers of layers and experts."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=_VOCAB,
        hidden_size=_HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        num_experts=experts,
        num_experts_per_tok=8,
        moe_intermediate_size=_SIZE,
        max_position_embeddings=4096,
        **_NO_TOKENS,
    )
    config.architectures, config.dtype = ["Qwen3MoeForCausalLM"], "bfloat16"
    config.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    shards = {"ends": {"model.embed_tokens": (_VOCAB, _HIDDEN), "lm_head": (_VOCAB, _HIDDEN), "model.norm": (_HIDDEN,)}}
    shards |= {f"layer-{index}": dict(_layer(f"model.layers.{index}", experts)) for index in range(layers)}
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    seeds = count(1)
    index: dict[str, str] = {}
    for shard, shapes in shards.items():
        tensors = {f"{name}.weight": _random(noise, shape, next(seeds)) for name, shape in shapes.items()}
        save_file(tensors, directory / f"model-{shard}.safetensors", {"format": "pt"})
        index |= dict.fromkeys(tensors, f"model-{shard}.safetensors")
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}), "utf-8")


def _layer(layer: str, experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Returns the shapes of a layer's tensors by name."""
    for name, heads in (("q", _HEADS), ("k", _KV_HEADS), ("v", _KV_HEADS)):
        yield f"{layer}.self_attn.{name}_proj", (heads * _HEAD_DIM, _HIDDEN)
    yield f"{layer}.self_attn.o_proj", (_HIDDEN, _HEADS * _HEAD_DIM)
    yield from ((f"{layer}.self_attn.{name}_norm", (_HEAD_DIM,)) for name in ("q", "k"))
    yield from ((f"{layer}.{name}_layernorm", (_HIDDEN,)) for name in ("input", "post_attention"))
    yield f"{layer}.mlp.gate", (experts, _HIDDEN)
    for expert in range(experts):
        yield from ((f"{layer}.mlp.experts.{expert}.{name}_proj", (_SIZE, _HIDDEN)) for name in ("gate", "up"))
        yield f"{layer}.mlp.experts.{expert}.down_proj", (_HIDDEN, _SIZE)


def _random(noise: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    """Returns bfloat16 of this shape: ones for a norm, else the noise from a place that depends on the seed."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    size, begin = shape[0] * shape[1], seed * 7919 % len(noise)
    return noise.repeat(-(-(begin + size) // len(noise)))[begin : begin + size].view(shape) * 0.02


def write_drafter(directory: Path) -> None:
    """Write a small dense model of the mixture's vocabulary."""
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=_VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        **_NO_TOKENS,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(directory)
    _tokenizer().save_pretrained(directory)


_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of single bytes, with words to fill the vocabulary that no text has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {char: index for index, char in enumerate(alphabet)}
    words |= {f"unused {index}": index for index in range(len(words), _VOCAB)}
    backend = Tokenizer(models.BPE(words, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


if __name__ == "__main__":
    main()
