"""The names of what a bundle's graphs read and write: the exporter gives them, the engines bind them.

Names of files are in `engines.bundle.manifest`. In every graph the batch dimension is 1; S is the number of tokens fed.
"""

# Inputs of every decoder.
INPUT_IDS = "input_ids"  # int64[1, S]
POSITION_IDS = "position_ids"  # int64[1, S]
PAST = "past_key_values."  # then LAYER.key or LAYER.value: [1, kv_heads, slots, head_dim]

# Inputs of graphs for ONNX Runtime.
SEQLENS_K = "seqlens_k"  # int32[1]: tokens in the KV cache after this call, less one
TOTAL_LENGTH = "total_sequence_length"  # int32[1], on the host: see `engines.ort_cuda.engine`
ATTENTION_PADDING = "attention_padding"  # int64[1], 0 unless it is fed: rows that attention alone computes in addition
KEEP = "num_logits_to_keep"  # int64[1]: how many of the last positions the LM head reads

# Inputs of graphs for TensorRT.
LOGITS_POSITIONS = "logits_positions"  # int64[keep]: the positions that the LM head reads
ATTENDED_SLOTS = "attended_slots"  # int64[span], the numbers from 0 on: the slots of the KV cache that are read

# Inputs of drafters with M in-context slots: columns of the logits behind those of the LM head.
SLOT_WEIGHT = "slot_weight"  # [hidden, M]
SLOT_BIAS = "slot_bias"  # [M], where the LM head has a bias
SLOT_TOKEN_IDS = "slot_token_ids"  # int64[M], -1 for an empty slot
SLOT_INPUTS = (SLOT_WEIGHT, SLOT_BIAS, SLOT_TOKEN_IDS)

# Outputs of every decoder.
LOGITS = "logits"  # [1, keep, head_rows], or head_rows + M columns
TOKEN_IDS = "token_ids"  # int64[1, keep]: the most likely token at each position
PRESENT = "present."  # the KV cache after the call, by the same ends as under `PAST`

# Inputs and outputs of graphs that hand hidden states on.
FEATURES_OUTPUT = "features"  # [1, S, layers · hidden]: the target's hidden states, which heads read
HIDDEN_INPUT, HIDDEN_OUTPUT = "hidden", "next_hidden"  # [1, S, hidden]: what a head reads, and gives to its next step

# Tensors.
TOKEN_TABLE = "kept_token_ids"  # int64[K]: the token of each row of a trimmed LM head


def cache_names(prefix: str, layer: int) -> tuple[str, str]:
    """Returns the names of one layer's keys and values.

    Args:
        prefix: `PAST` or `PRESENT`.
        layer: The number of the layer, from 0.
    """
    return f"{prefix}{layer}.key", f"{prefix}{layer}.value"


def present_name(past: str) -> str:
    """Returns the name of the output that updates the cache which the input `past` reads."""
    return PRESENT + past.removeprefix(PAST)
