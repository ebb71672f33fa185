"""Each `--format` through the program that it is for, on real weights; the greedy text must be ours, token for token.

    make interop

runs the export below with every format and then this, and writes benchmarks/results/smollm2_interop.json.

    python benchmarks/interop.py --output DIR --model MODEL
"""

import argparse
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from engines import load_engine
from runtime import SpeculativeDecoder
from runtime.measure.environment import environment

QUESTIONS = [
    "A farmer has 17 sheep and buys 3 pens for 8 sheep each. How many more sheep fit in?",
    "Name three rivers in Europe and say where they end.",
    "Write a Python function that sorts a list.",
]
NEW_TOKENS = 48
PACKAGES = ("onnxruntime", "onnxruntime-genai", "openvino", "openvino-genai", "torch", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="the output of vocabtrim-export, in every format")
    parser.add_argument("--model", type=Path, required=True, help="the .gguf file that it was exported from")
    options = parser.parse_args()
    with SpeculativeDecoder.load(options.output / "target", options.output / "drafter") as decoder:
        prompts = [list(decoder.encode(question)) for question in QUESTIONS]
        results = [decoder.generate(prompt, max_new_tokens=NEW_TOKENS) for prompt in prompts]
    ours = [list(result.token_ids) for result in results]
    formats = {
        "hf": hf(options.output / "hf", options.model, prompts, ours),
        "genai": genai(options.output / "genai", prompts, ours),
        "openvino": openvino(options.output / "openvino", prompts, ours),
        "sglang-token-map": sglang(options.output),
    }
    report = {
        **environment(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "new_tokens": [len(ids) for ids in ours],
        "ours": {"block_efficiency": [round(result.stats.block_efficiency, 2) for result in results]},
        **formats,
    }
    print(json.dumps(report, indent=2))
    if failed := [name for name, result in formats.items() if not result["equal"]]:
        raise SystemExit(f"not equal: {', '.join(failed)}")


def hf(path: Path, model: Path, prompts: Sequence[list[int]], ours: Sequence[list[int]]) -> dict[str, Any]:
    """transformers' assisted generation, the checkpoint as `assistant_model`."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    target = load(model.parent, gguf_file=model.name, dtype=torch.float32).eval()
    drafter = load(path, trust_remote_code=True, dtype=torch.float32).eval()
    calls = [0]
    target.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    texts, steps = [], []
    for prompt in prompts:
        ids, calls[0] = torch.tensor([prompt]), 0
        with torch.no_grad():
            out = target.generate(ids, assistant_model=drafter, do_sample=False, max_new_tokens=NEW_TOKENS)
        texts.append(out[0, len(prompt) :].tolist())
        steps.append(calls[0])
    return {
        "equal": texts == list(ours),
        "head_rows": drafter.get_output_embeddings().out_features,
        "tokens_per_target_call": [round(len(text) / step, 2) for text, step in zip(texts, steps, strict=True)],
    }


def genai(path: Path, prompts: Sequence[list[int]], ours: Sequence[list[int]]) -> dict[str, Any]:
    """ONNX Runtime GenAI's own speculative decoding."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(path))
    tokenizer = onnxruntime_genai.Tokenizer(model)
    chats = [json.dumps([{"role": "user", "content": question}]) for question in QUESTIONS]
    templated = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    encoded = [tokenizer.encode(text).tolist() for text in templated]
    texts, emitted = [], []
    for prompt in prompts:
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + NEW_TOKENS)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(np.array(prompt, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        texts.append(generator.get_sequence(0)[len(prompt) :].tolist())
        emitted.append(round(generator.get_speculative_stats()["mean_emitted_tokens_per_round"], 2))
    return {
        "equal": texts == [ids[: len(text)] for ids, text in zip(ours, texts, strict=True)],
        "tokens": [len(text) for text in texts],
        "tokens_per_round": emitted,
        "prompts_equal": encoded == list(prompts),
    }


def openvino(path: Path, prompts: Sequence[list[int]], ours: Sequence[list[int]]) -> dict[str, Any]:
    """OpenVINO GenAI's pipeline, of the target alone and with the drafter, its tokenizer's chat template included."""
    import openvino_genai

    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    tokenizer = openvino_genai.Tokenizer(str(path / "target"))
    templated = [tokenizer.apply_chat_template([{"role": "user", "content": q}], True) for q in QUESTIONS]
    encoded = [tokenizer.encode(text).input_ids for text in templated]
    draft = openvino_genai.draft_model(str(path / "drafter"), "CPU", **exact)
    found = {}
    for name, options, drafted in (("plain", {}, 0), ("speculative", {"draft_model": draft}, 2)):
        pipeline = openvino_genai.LLMPipeline(str(path / "target"), "CPU", **exact, **options)
        config = openvino_genai.GenerationConfig(max_new_tokens=NEW_TOKENS, num_assistant_tokens=drafted)
        config.do_sample = False
        found[name] = [pipeline.generate(ids, config) for ids in encoded]
    texts = {name: [list(result.tokens[0]) for result in results] for name, results in found.items()}
    wanted = [[ids[: len(text)] for ids, text in zip(ours, each, strict=True)] for each in texts.values()]
    metrics = [result.extended_perf_metrics for result in found["speculative"]]
    return {
        "equal": list(texts.values()) == wanted,
        "tokens": {name: [len(text) for text in each] for name, each in texts.items()},
        "accepted_tokens": [each.get_num_accepted_tokens() for each in metrics],
        "prompts_equal": [ids.data[0].tolist() for ids in encoded] == list(prompts),
    }


def sglang(output: Path) -> dict[str, Any]:
    """The file as SGLang's `load_token_map` opens it."""
    ids = torch.tensor(torch.load(output / "sglang-token-map" / "hot_token_ids.pt", weights_only=True))
    with load_engine(output / "drafter") as engine:
        assert engine.vocab_map is not None
        return {"equal": ids.tolist() == engine.vocab_map.kept_token_ids.tolist(), "ids": len(ids)}


if __name__ == "__main__":
    main()
