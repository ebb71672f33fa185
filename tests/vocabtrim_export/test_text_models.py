"""The text model of a multimodal checkpoint computes the whole's logits for a text, in every family's layout."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engines.errors import VocabtrimError
from vocabtrim_export.sources.checkpoint import read_checkpoint_tokenizer
from vocabtrim_export.sources.refusals import check_architecture
from vocabtrim_export.sources.source import load_source
from vocabtrim_export.sources.text_models import text_config, text_tensor_names

TEXT = {
    "vocab_size": 448,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
SIGHT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
QWEN_SIGHT = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
FAMILIES = {
    "gemma3": {"text_config": TEXT, "vision_config": SIGHT, "mm_tokens_per_image": 4, "image_token_index": 440},
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": SIGHT | {"model_type": "clip_vision_model"},
        "image_token_index": 440,
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": SIGHT | {"model_type": "pixtral", "head_dim": 16},
        "image_token_index": 440,
    },
    "qwen2_5_vl": {"text_config": TEXT | {"rope_parameters": SECTIONS}, "vision_config": QWEN_SIGHT},
    "qwen3_vl": {
        "text_config": TEXT | {"rope_parameters": SECTIONS},
        "vision_config": QWEN_SIGHT | {"deepstack_visual_indexes": [0]},
    },
    "qwen3_vl_moe": {
        "text_config": TEXT
        | {"rope_parameters": SECTIONS}
        | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        "vision_config": QWEN_SIGHT | {"deepstack_visual_indexes": [0]},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_model_of_a_multimodal_checkpoint(family, tokenizer, tmp_path):
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[family](**FAMILIES[family])
    whole = transformers.AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    source = load_source(str(tmp_path), torch.float32)
    assert "multimodal" in " ".join(source.notes)
    ids = torch.randint(0, 400, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(source.model(ids).logits, wanted, atol=1e-4, rtol=1e-4)


def test_experts_that_are_stored_the_other_way_round(tokenizer, tmp_path):
    """transformers saves Qwen3-VL's mixtures as they are in memory; those that Qwen published are transposed."""
    config = transformers.CONFIG_MAPPING["qwen3_vl_moe"](**FAMILIES["qwen3_vl_moe"])
    whole = transformers.AutoModelForImageTextToText.from_config(config)
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    experts = {name: each for name, each in stored.items() if ".experts." in name}
    save_file(stored | {name: each.mT.contiguous() for name, each in experts.items()}, file, {"format": "pt"})
    read = load_source(str(tmp_path), torch.float32).model.state_dict()
    assert len(experts) == 2 * TEXT["num_hidden_layers"]
    for name, each in whole.model.language_model.state_dict().items():
        assert torch.equal(read[f"model.{name}"], each), name


def test_towers_in_a_file_of_their_own_and_a_backup_beside_the_model(tokenizer, tmp_path):
    """The files are those of the index, and all of them say what is a tower: `projector` alone says nothing."""
    config = transformers.CONFIG_MAPPING["llava"](**FAMILIES["llava"])
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    files = {name: "b" if "language_model" in name or "lm_head" in name else "a" for name in whole} | {"projector": "a"}
    for file in ("a", "b"):
        part = {name: whole.get(name, torch.ones(2)) for name, place in files.items() if place == file}
        save_file(part, tmp_path / f"{file}.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in whole.items()}, tmp_path / "old.safetensors")
    index = {"weight_map": {name: f"{file}.safetensors" for name, file in files.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    embedding = load_source(str(tmp_path), torch.float32).model.get_input_embeddings().weight
    assert torch.equal(embedding, next(whole[name] for name in whole if name.endswith("embed_tokens.weight")))


def test_a_template_in_a_file_of_the_processor(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    assert read_checkpoint_tokenizer("MODEL", str(tmp_path)).chat_template == "{{ messages[0].content }}"


def test_a_text_model_that_transformers_has_only_inside_the_whole():
    with pytest.raises(VocabtrimError, match="multimodal model whose text model"):
        text_config("MODEL", transformers.CONFIG_MAPPING["mllama"]())


def test_a_decoder_that_reads_an_encoder_is_no_text_model():
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(), transformers.GPT2Config()
    )
    with pytest.raises(VocabtrimError, match=r"MODEL \(vision-encoder-decoder\) is an encoder-decoder model"):
        check_architecture("MODEL", text_config("MODEL", config))


def test_only_the_text_models_tensors_are_read():
    beside = ["model.vision_tower.a.weight", "encoder.layers.0.bias", "projector.weight"]
    text = {"model.language_model.norm.weight": "model.norm.weight", "lm_head.weight": "lm_head.weight"}
    assert text_tensor_names([*beside, *text]) == text
    unprefixed = ["model.norm.weight", "model.layers.0.own.weight", "lm_head.weight"]  # each has to be read, then
    assert text_tensor_names(["model.vision_embed_tokens.weight", *unprefixed]) == {name: name for name in unprefixed}
