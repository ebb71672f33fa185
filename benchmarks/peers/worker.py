"""One way of decoding in a process of its own.

`run.py` starts it with a way's name, the export's directory and the model's file. It prints a JSON line when the way is
loaded, then answers each line {"prompt": token ids, "tokens": n} with the greedy tokens, and ends with its input.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

Decode = Callable[[list[int], int], list[int]]  # a prompt and the number of new tokens → those tokens


def ours(output: Path, drafter: str | None) -> Decode:
    from runtime import SpeculativeDecoder

    decoder = SpeculativeDecoder.load(output / "target", output / drafter if drafter else None)
    return lambda prompt, tokens: list(decoder.generate(prompt, max_new_tokens=tokens).token_ids)


def transformers(model: Path, assistant: Path | None = None, **options: Any) -> Decode:
    import torch
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    target = load(model.parent, gguf_file=model.name, dtype=torch.float32).eval()
    if assistant:
        options["assistant_model"] = load(assistant, trust_remote_code=True, dtype=torch.float32).eval()

    def decode(prompt: list[int], tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = target.generate(ids, do_sample=False, max_new_tokens=tokens, **options)
        return out[0, len(prompt) :].tolist()

    return decode


def ort_genai(directory: Path, draft_tokens: int) -> Decode:
    """draft_tokens: of the export's drafter; 0 for the target alone."""
    import numpy as np
    import onnxruntime_genai as genai

    if not draft_tokens:
        directory = without_drafter(directory)
    model = genai.Model(str(directory))

    def decode(prompt: list[int], tokens: int) -> list[int]:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + tokens)
        if draft_tokens:
            parameters.set_speculative_options(max_draft_tokens=draft_tokens)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array(prompt, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return generator.get_sequence(0)[len(prompt) :].tolist()

    return decode


def without_drafter(directory: Path) -> Path:
    """Returns a directory of the same files whose configuration names no drafter."""
    plain = directory.with_name(f"{directory.name}_plain")
    plain.mkdir(exist_ok=True)
    for file in directory.iterdir():
        if not (plain / file.name).exists():
            (plain / file.name).symlink_to(file.resolve())
    config = json.loads((directory / "genai_config.json").read_text("utf-8"))
    config["model"].pop("draft", None)
    config.pop("speculative", None)
    (plain / "genai_config.json").unlink()
    (plain / "genai_config.json").write_text(json.dumps(config), "utf-8")
    return plain


def openvino_genai(directory: Path, draft_tokens: int = 0, has_drafter: bool = False) -> Decode:
    """draft_tokens: of the export's drafter or, where it is not used, of a prompt lookup; 0 for the target alone."""
    import numpy as np
    import openvino
    import openvino_genai as genai

    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    options: dict[str, Any] = dict(exact)
    if has_drafter:
        options["draft_model"] = genai.draft_model(str(directory / "drafter"), "CPU", **exact)
    elif draft_tokens:
        options["prompt_lookup"] = True
    pipeline = genai.LLMPipeline(str(directory / "target"), "CPU", **options)

    def decode(prompt: list[int], tokens: int) -> list[int]:
        config = pipeline.get_generation_config()
        config.max_new_tokens, config.do_sample = tokens, False
        if draft_tokens:
            config.num_assistant_tokens = draft_tokens
        if draft_tokens and not has_drafter:
            config.max_ngram_size = 3
        return list(pipeline.generate(openvino.Tensor(np.array([prompt])), config).tokens[0])

    return decode


def ways(output: Path, model: Path) -> dict[str, Callable[[], Decode]]:
    """What loads each way, by its name; the first is what the others are compared with.

    The other programs' draft lengths are the best of 2, 3 and 5 on these prompts, or what their documentation advises.
    """
    return {
        "ours, target only": lambda: ours(output, None),
        "ours, trimmed drafter": lambda: ours(output, "drafter"),
        "transformers, plain": lambda: transformers(model),
        "transformers, prompt lookup": lambda: transformers(model, prompt_lookup_num_tokens=3),
        "transformers, trimmed drafter": lambda: transformers(model, output / "hf"),
        "ONNX Runtime GenAI, plain": lambda: ort_genai(output / "genai", 0),
        "ONNX Runtime GenAI, trimmed drafter": lambda: ort_genai(output / "genai", 2),
        "OpenVINO GenAI, plain": lambda: openvino_genai(output / "openvino"),
        "OpenVINO GenAI, prompt lookup": lambda: openvino_genai(output / "openvino", 3),
        "OpenVINO GenAI, trimmed drafter": lambda: openvino_genai(output / "openvino", 2, has_drafter=True),
    }


def peak_megabytes() -> float:
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    name, output, model = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    replies = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not end up between the replies
    start = perf_counter()
    decode = ways(output, model)[name]()
    print(json.dumps({"load_seconds": perf_counter() - start}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        start = perf_counter()
        tokens = decode(request["prompt"], request["tokens"])
        seconds = perf_counter() - start
        reply = {"tokens": tokens, "seconds": seconds, "peak_megabytes": peak_megabytes()}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
