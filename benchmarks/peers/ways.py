"""The ways of decoding that are compared, each of which loads one program as its own documentation advises."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Decode = Callable[[list[int], int], list[int]]  # a prompt and the number of new tokens → those tokens
Precision = Literal["fp32", "int8", "int4"]

DRAFTS = 3  # tokens that a peer drafts: the best of 2, 3 and 5 on these prompts, or what its documentation advises


@dataclass(frozen=True, slots=True)
class Program:
    """A loaded program.

    Attributes:
        decode: Decodes greedily.
        pid: The process that holds the weights.
    """

    decode: Decode
    pid: int


@dataclass(frozen=True, slots=True)
class Way:
    """One way of decoding.

    Attributes:
        weights: The target's weights; only texts of the same weights can be compared.
        load: Loads the program.
        cannot: Why the program cannot do this, where it cannot.
    """

    weights: str
    load: Callable[[], Program] | None = None
    cannot: str = ""


def ways(models: Path, precision: Precision) -> dict[str, Way]:
    """Returns the ways by their names, our target alone first.

    Args:
        models: What `prepare.py` wrote.
        precision: The target's.
    """
    own = models / precision
    return (
        _ours(models, precision) | _peers(own) | _llama_cpp(models, precision) | _transformers(models, own, precision)
    )


def targets(models: Path, precision: Precision) -> tuple[Path, Path]:
    """Returns our target's bundle, and its bundle for the EAGLE-3 head."""
    return models / precision / "pair" / "target", models / precision / "eagle" / "target"


def _ours(models: Path, precision: Precision) -> dict[str, Way]:
    own = models / precision
    target, eagle_target = targets(models, precision)

    def way(target: Path, drafter: Path | None = None, lookup: bool = True) -> Way:
        return Way("bundle", lambda: ours(target, drafter, "auto" if lookup else None))

    return {
        "ours, target only": way(target, lookup=False),
        "ours, prompt lookup alone": way(target),
        "ours, full int4 drafter": way(target, models / "full" / "drafter"),
        "ours, trimmed drafter with slots": way(target, own / "pair" / "drafter"),
        "ours, EAGLE-3 head": way(eagle_target, own / "eagle" / "drafter"),
    }


def _peers(own: Path) -> dict[str, Way]:
    genai, openvino = own / "peers" / "genai", own / "peers" / "openvino"
    eagle = Way("bundle", cannot="reads only heads that optimum-intel has converted")
    return {
        "ONNX Runtime GenAI, plain": Way("bundle", lambda: ort_genai(genai)),
        "ONNX Runtime GenAI, n-gram": Way("bundle", lambda: ort_genai(genai, max_draft_tokens=DRAFTS, ngram_size=3)),
        "ONNX Runtime GenAI, trimmed drafter": Way("bundle", lambda: ort_genai(genai, max_draft_tokens=2)),
        "OpenVINO GenAI, plain": Way("bundle", lambda: openvino_genai(openvino)),
        "OpenVINO GenAI, prompt lookup": Way("bundle", lambda: openvino_genai(openvino, DRAFTS)),
        "OpenVINO GenAI, trimmed drafter": Way("bundle", lambda: openvino_genai(openvino, 2, has_drafter=True)),
        "OpenVINO GenAI, EAGLE-3 head": eagle,
    }


def _llama_cpp(models: Path, precision: Precision) -> dict[str, Way]:
    drafter = ("--model-draft", str(models / "gguf" / "drafter_Q4_0.gguf"), "--spec-type", "draft-simple")
    kinds = {
        "plain": (),
        "draft model": (*drafter, "--spec-draft-n-max", str(DRAFTS)),
        "n-gram": ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "3", "--spec-ngram-simple-size-m", "4"),
    }
    names = {"fp32": ("F32",), "int8": ("Q8_0",), "int4": ("Q4_0", "Q4_1")}[precision]
    # The cache in fp32 where the weights are, to compare texts; otherwise what the server chooses.
    cache = ("--cache-type-k", "f32", "--cache-type-v", "f32") if precision == "fp32" else ()

    def way(name: str, options: tuple[str, ...]) -> Way:
        file = models / "gguf" / f"target_{name}.gguf"
        return Way(
            "bundle" if name == "F32" else name, lambda: llama_cpp(models / "llama.cpp", file, (*cache, *options))
        )

    return {f"llama.cpp {name}, {kind}": way(name, options) for name in names for kind, options in kinds.items()}


def _transformers(models: Path, own: Path, precision: Precision) -> dict[str, Way]:
    target, assistant = models / "gguf" / "target_F32.gguf", own / "peers" / "hf"
    kinds: Mapping[str, Callable[[], Program]] = {
        "plain": lambda: transformers(target),
        "prompt lookup": lambda: transformers(target, prompt_lookup_num_tokens=DRAFTS),
        "trimmed drafter": lambda: transformers(target, assistant),
    }
    if precision != "fp32":
        return {"transformers": Way("bundle", cannot="quantises by libraries of its own, to other weights")}
    return {f"transformers, {kind}": Way("bundle", load) for kind, load in kinds.items()}


def ours(target: Path, drafter: Path | None, draft_length: Literal["auto"] | None) -> Program:
    from runtime import SpeculativeDecoder

    decoder = SpeculativeDecoder.load(target, drafter, draft_length=draft_length)
    return Program(lambda prompt, tokens: list(decoder.generate(prompt, max_new_tokens=tokens).token_ids), os.getpid())


def transformers(model: Path, assistant: Path | None = None, **options: Any) -> Program:
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
        decoded: list[int] = out[0, len(prompt) :].tolist()
        return decoded

    return Program(decode, os.getpid())


def ort_genai(directory: Path, **speculation: int) -> Program:
    """speculation: GenAI's own options; none for the target alone, with `ngram_size` without the drafter."""
    import numpy as np
    import onnxruntime_genai as genai

    uses_drafter = bool(speculation) and "ngram_size" not in speculation
    model = genai.Model(str(directory if uses_drafter else without_drafter(directory)))

    def decode(prompt: list[int], tokens: int) -> list[int]:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + tokens)
        if speculation:
            parameters.set_speculative_options(**speculation)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array(prompt, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        decoded: list[int] = generator.get_sequence(0)[len(prompt) :].tolist()
        return decoded

    return Program(decode, os.getpid())


def without_drafter(directory: Path) -> Path:
    """Returns a directory of the same files whose configuration names no drafter."""
    plain = directory.with_name(f"{directory.name}_plain")
    plain.mkdir(exist_ok=True)
    config = json.loads((directory / "genai_config.json").read_text("utf-8"))
    config["model"].pop("draft", None)
    config.pop("speculative", None)
    for file in directory.iterdir():
        if file.name != "genai_config.json" and not (plain / file.name).exists():
            (plain / file.name).symlink_to(file.resolve())
    (plain / "genai_config.json").write_text(json.dumps(config), "utf-8")
    return plain


def openvino_genai(directory: Path, draft_tokens: int = 0, has_drafter: bool = False) -> Program:
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

    return Program(decode, os.getpid())


def llama_cpp(build: Path, model: Path, options: tuple[str, ...]) -> Program:
    from llama_server import LlamaServer

    server = LlamaServer(build / "bin" / "llama-server", model, options)
    return Program(server.decode, server.pid)
