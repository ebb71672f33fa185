"""Tiny random models of the architectures that transformers registers, saved with a tokenizer of bytes."""

from pathlib import Path
from typing import Any

from tiny_configs import tiny_config

FAMILIES = [  # of multimodal models, whose text model is exported
    *("got_ocr2", "gemma3", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "mistral3"),
    *("paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm"),
]


def save_tokenizer(directory: Path) -> None:
    """A tokenizer of bytes: every architecture gets the same."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(directory)


def save_model(name: str, directory: Path) -> tuple[Any, dict[str, Any]]:
    """Save a random model → (transformers' model as it loads it, what it is)."""
    import torch
    import transformers

    config = tiny_config(name)
    auto: Any = transformers.AutoModelForCausalLM
    if name in FAMILIES and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        auto = transformers.AutoModelForImageTextToText
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # far from uniform logits; norms and biases away from ones and zeros, which hide mistakes
        for label, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(noise * 0.2)
            else:
                is_table = "embed" in label or "wte" in label
                parameter.copy_(noise if is_table else noise * 1.3 * parameter.shape[-1] ** -0.5)
        for label, buffer in model.named_buffers():
            if label.endswith("correction_bias"):  # of a router, which starts as zeros too
                buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.2)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    row = {"class": type(model).__name__, "parameters": sum(each.numel() for each in model.parameters())}
    return auto.from_pretrained(directory).eval(), row
