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
from runtime.environment import environment

QUESTIONS = [
    "A farmer has 17 sheep and buys 3 pens for 8 sheep each. How many more sheep fit in?",
    "Name three rivers in Europe and say where they end.",
    "Write a Python function that sorts a list.",
]
NEW_TOKENS = 48
PACKAGES = ("onnxruntime", "onnxruntime-genai", "openvino", "torch", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="what vocabtrim-export wrote, in every format")
    parser.add_argument("--model", type=Path, required=True, help="the .gguf file that it was made of")
    options = parser.parse_args()
    with SpeculativeDecoder.load(options.output / "target", options.output / "drafter") as decoder:
        prompts = [list(decoder.encode(question)) for question in QUESTIONS]
        results = [decoder.generate(prompt, max_new_tokens=NEW_TOKENS) for prompt in prompts]
    ours = [list(result.token_ids) for result in results]
    formats = {
        "hf": hf(options.output / "hf", options.model, prompts, ours),
        "genai": genai(options.output / "genai", prompts, ours),
        "openvino": openvino(options.output, prompts, ours),
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


def openvino(output: Path, prompts: Sequence[list[int]], ours: Sequence[list[int]]) -> dict[str, Any]:
    """OpenVINO on the graphs of `genai`: the target's greedy text, and the drafter's tokens beside our engine's."""
    texts = [_openvino_greedy(output / "genai" / "target", prompt) for prompt in prompts]
    run = _openvino_model(output / "genai" / "drafter")
    same = total = 0
    with load_engine(output / "drafter") as engine:
        for prompt, text in zip(prompts, ours, strict=True):
            logits, _ = run([*prompt, *text], None)
            engine.rewind(0)
            wanted = engine.feed([*prompt, *text], keep=len(text)).token_ids
            same += int(np.sum(logits[-len(text) :].argmax(-1) == wanted))
            total += len(text)
    return {"equal": texts == list(ours), "drafter_tokens_equal": f"{same}/{total}"}


def _openvino_greedy(directory: Path, prompt: Sequence[int]) -> list[int]:
    run = _openvino_model(directory)
    logits, past = run(prompt, None)
    found = [int(logits[-1].argmax())]
    ends = {int(x) for x in json.loads((directory.parent / "genai_config.json").read_text())["model"]["eos_token_id"]}
    while len(found) < NEW_TOKENS and found[-1] not in ends:
        logits, past = run(found[-1:], past)
        found.append(int(logits[-1].argmax()))
    return found


def _openvino_model(directory: Path) -> Any:
    """run(ids, past) → logits: [S, vocab] and the cache; its cache is as long as the text."""
    import openvino

    compiled = openvino.Core().compile_model(directory / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = {x.get_any_name(): x.get_partial_shape() for x in compiled.inputs}
    caches = {name: shape for name, shape in names.items() if name.startswith("past_key_values.")}
    empty = {name: np.zeros([1, shape[1].get_length(), 0, shape[3].get_length()]) for name, shape in caches.items()}
    outputs = {name: compiled.output(name.replace("past_key_values", "present")) for name in caches}

    def run(ids: Sequence[int], past: dict[str, np.ndarray] | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        past = past or {name: array.astype(np.float32) for name, array in empty.items()}
        length = next(iter(past.values())).shape[2] + len(ids)
        feed = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, length), np.int64)}
        result = compiled(feed | past)
        present = {name: np.array(result[output]) for name, output in outputs.items()}
        return np.array(result[compiled.output("logits")][0]), present

    return run


def sglang(output: Path) -> dict[str, Any]:
    """The file as SGLang's `load_token_map` opens it."""
    ids = torch.tensor(torch.load(output / "sglang-token-map" / "hot_token_ids.pt", weights_only=True))
    with load_engine(output / "drafter") as engine:
        assert engine.vocab_map is not None
        return {"equal": ids.tolist() == engine.vocab_map.kept_token_ids.tolist(), "ids": len(ids)}


if __name__ == "__main__":
    main()
