"""A configuration of any architecture with every size made small: transformers' own default, shrunk by name."""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 448
_SIZES = {
    VOCABULARY: "vocab_size unpadded_vocab_size decoder_vocab_size vocab_size_per_layer_input",
    256: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length",
    192: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dim_ff dff n_inner ffn_hidden_size "
    "intermediate_size_mlp shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size "
    "dense_intermediate_size block_ffn_dim",
    128: "hidden_size d_model n_embd dim_model emb_dim embedding_size word_embed_proj_dim hidden_size_per_layer_input "
    "attention_hidden_size lru_width expert_ffn_hidden_size backbone_hidden_size mamba_d_ssm out_hidden_size",
    64: "moe_intermediate_size q_lora_rank d_embed",
    32: "head_dim global_head_dim swa_head_dim kv_lora_rank qk_nope_head_dim v_head_dim dim_head kv_channels "
    "attention_head_dim swa_v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim d_kv",
    16: "qk_rope_head_dim mamba_d_state state_size mamba_d_head",
    8: "sliding_window sliding_window_size window_size attention_chunk_size index_topk attention_window_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "swa_num_attention_heads linear_num_value_heads linear_num_heads index_n_heads mamba_n_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_key_value_heads num_kv_heads "
    "swa_num_key_value_heads linear_num_key_heads num_experts_per_tok num_experts_per_token moe_topk moe_k "
    "mamba_n_groups n_groups num_key_value_heads_swa num_global_key_value_heads depth",
    1: "n_group topk_group num_expert_group first_k_dense_replace num_dense_layers n_shared_experts "
    "num_shared_experts moe_num_shared_experts type_vocab_size",
    0: "num_nextn_predict_layers",
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_PLACEHOLDER = 430  # image and audio tokens, which no prompt holds
_LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "hybrid_override_pattern")
_MAMBA = {"mamba_n_heads": 16, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}

# What shrinking by name alone leaves inconsistent. "name:variant" is a second configuration of an architecture.
CHANGES: dict[str, dict[str, Any]] = {
    **{
        name: {"text_config": {"rope_parameters": {"mrope_section": [4, 6, 6]}}}  # the default is for wider heads
        for name in ("qwen2_vl", "qwen2_5_vl")
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 256},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "codegen": {"rotary_dim": 16},
    "gptj": {"rotary_dim": 16},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _PLAIN_ROPE, "sliding_attention": _PLAIN_ROPE},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 128, "ffn_hidden_size": 192, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {"kv_lora_rank": 32, "num_key_value_heads": 4},
    "deepseek_v2": {"topk_method": "greedy"},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "intermediate_size": 192,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "laurel_rank": 16,
    },
    "gemma4_text": {"per_layer_config": {1: {"head_dim": 64}}, "hidden_size_per_layer_input": 16},
    "gemma4_unified_text": {"per_layer_config": {1: {"head_dim": 64}}, "hidden_size_per_layer_input": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2},
    "hunyuan_v1_dense": {"head_dim": 32},
    "hunyuan_v1_moe": {"head_dim": 32, "moe_intermediate_size": 64, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 48, "zero_expert_num": 2},
    "mamba2": {"num_heads": 16, "head_dim": 16, "n_groups": 1, "state_size": 16},
    "ministral": {"head_dim": 32, "layer_types": ["sliding_attention", "full_attention"]},
    "nemotron": {"head_dim": 32, "num_key_value_heads": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [64, 64],
        "axial_pos_shape": [16, 16],
        "attn_layers": ["local", "lsh"],
        "lsh_attn_chunk_length": 16,
        "local_attn_chunk_length": 16,
        "num_buckets": 4,
    },
    "xlnet": {"d_head": 32, "d_inner": 192},
    "xlstm": {"num_blocks": 2, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 256,
        "attention_head_dim": 64,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
        "n_mamba_heads": 2,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "hybrid_layer_ids": [1],
        "attention_hidden_size": 256,
        "attention_head_dim": 64,
        "kv_channels": 32,
        "num_query_groups": 4,
        "mamba_headdim": 32,
        "num_key_value_heads": 4,
        "use_mamba_kernels": False,
    },
    "llama:biases and a tied head": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen3:tied head": {"tie_word_embeddings": True},
    "falcon:ALiBi": {"alibi": True},
    **{
        f"{name}:experts in groups": {
            **{"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
            **{"n_group": 4, "topk_group": 2},
        }
        for name in ("dots1", "glm4_moe")
    },
    **{
        f"{name}:as a decoder": {"is_decoder": True}
        for name in (
            *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
            *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
        )
    },
}


def tiny_config(name: str, changes: dict[str, Any] | None = None) -> PreTrainedConfig:
    """The configuration of an architecture, or of a variant "architecture:variant" of `CHANGES`, with small sizes."""
    kind = CONFIG_MAPPING[name.partition(":")[0]]
    default = kind()
    data = {key: value for key, value in default.to_dict().items() if key not in _NO_SETTINGS}
    small = _shrink(data, _layers(default))
    for key, part in data.items():
        if key == "text_config" and isinstance(part, dict) and part.get("model_type") in CONFIG_MAPPING:
            small[key] = tiny_config(part["model_type"]).to_dict()
    _merge(small, CHANGES.get(name, {}) | (changes or {}))
    return kind(**small)


_NO_SETTINGS = {
    "transformers_version",
    "_name_or_path",
    "model_type",
    "id2label",
    "label2id",
    "architectures",
    "per_layer_config",
}


def _layers(config: PreTrainedConfig) -> int:
    """Two layers, or as many as there are kinds of them."""
    try:
        text = config.get_text_config()
    except ValueError:  # an encoder-decoder of several models
        text = config
    kinds = {str(kind) for name in _LAYER_KINDS for kind in getattr(text, name, None) or ()}
    return max(2, len(kinds))


def _shrink(data: dict[str, Any], layers: int) -> dict[str, Any]:
    return {name: _small(name, value, data, layers) for name, value in data.items()}


def _small(name: str, value: Any, data: dict[str, Any], layers: int) -> Any:
    if isinstance(value, dict):
        if name == "rope_parameters" and "mrope_section" in value:
            return value | {"mrope_section": [4, 6, 6]}
        return _shrink(value, layers) if name.endswith("config") else value
    if name in _SMALL and isinstance(value, int | float) and not isinstance(value, bool):
        return _small_number(name, value, data, layers)
    if name in _IDS:
        return _IDS[name]
    if name.endswith(("token_id", "token_index")) and isinstance(value, int):
        return _PLACEHOLDER
    if isinstance(value, list) and layers < len(value) == data.get("num_hidden_layers", -1):
        return _one_of_each(value, layers)
    return value


def _small_number(name: str, value: float, data: dict[str, Any], layers: int) -> float:
    if value < 0:
        return value
    if name == "head_dim" and data.get("qk_rope_head_dim"):
        return _SMALL["qk_rope_head_dim"]
    if name == "num_key_value_heads" and "kv_lora_rank" in data:
        return _SMALL["num_attention_heads"]
    if _SMALL[name] == 2 and "layer" in name:
        return layers
    return type(value)(min(_SMALL[name], value))


def _one_of_each(values: list[Any], layers: int) -> list[Any]:
    """`layers` entries in their order, every distinct one among them where there is room."""
    seen: list[Any] = []
    for value in values:
        if value not in seen:
            seen.append(value)
    picked = seen[:layers]
    return picked + [seen[-1]] * (layers - len(picked))


def _merge(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            _merge(settings[key], value)
        else:
            settings[key] = value
