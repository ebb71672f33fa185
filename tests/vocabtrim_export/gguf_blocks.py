"""Blocks of GGUF's quantised types, random ones, and what they stand for, number by number as ggml defines them."""

import numpy as np

SCALES = {  # type → (bytes a block, weights a block, {offset of an fp16: about how large it is})
    "Q4_0": (18, 32, {0: 0.01}),
    "Q4_1": (20, 32, {0: 0.01, 2: -0.08}),
    "Q8_0": (34, 32, {0: 0.001}),
    "Q2_K": (84, 256, {80: 0.01, 82: 0.015}),
    "Q3_K": (110, 256, {108: 0.002}),
    "Q4_K": (144, 256, {0: 0.0003, 2: 0.0022}),
    "Q5_K": (176, 256, {0: 0.00015, 2: 0.0022}),
    "Q6_K": (210, 256, {208: 0.00008}),
}


def random_blocks(kind, rows, columns, generator):
    """uint8 [rows, bytes of a row]: any bytes are blocks, as long as the fp16 numbers among them are sane."""
    size, weights, scales = SCALES[kind]
    blocks = generator.integers(0, 256, (rows * columns // weights, size), np.uint8)
    for offset, about in scales.items():
        sizes = (about * generator.uniform(0.5, 1.5, len(blocks))).astype(np.float16)
        blocks[:, offset : offset + 2] = sizes.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def dense(kind, blocks, columns):
    """float32 [rows, columns] of uint8 [rows, bytes of a row]."""
    flat = blocks.reshape(-1, SCALES[kind][0])
    weights = SCALES[kind][1]
    out = np.empty((len(flat), weights), np.float64)
    for place in range(weights):
        out[:, place] = _WEIGHT[kind](flat.astype(np.int64), flat, place)
    return out.astype(np.float32).reshape(-1, columns)


def _half(blocks, offset):
    return blocks[:, offset : offset + 2].copy().view(np.float16)[:, 0].astype(np.float64)


def _nibble(b, start, place):
    """32 weights in 16 bytes: the first 16 are the low halves, the others the high ones."""
    return b[:, start + place % 16] >> (4 * (place // 16)) & 15


def _six_bits(b, start, group):
    """(scale, minimum) of a group of 32, packed in 12 bytes: Q4_K and Q5_K."""
    if group < 4:
        return b[:, start + group] & 63, b[:, start + group + 4] & 63
    scale = b[:, start + group + 4] & 15 | b[:, start + group - 4] >> 6 << 4
    return scale, b[:, start + group + 4] >> 4 | b[:, start + group] >> 6 << 4


def _four(b, start, place):
    """Blocks of 256: each 64 share 32 bytes, low halves first."""
    return b[:, start + place // 64 * 32 + place % 32] >> (4 * (place % 64 // 32)) & 15


def _two(b, start, place):
    """Blocks of 256: each 128 share 32 bytes, two bits a group of 32."""
    return b[:, start + place // 128 * 32 + place % 32] >> (2 * (place % 128 // 32)) & 3


def _q2_k(b, raw, place):
    scale = b[:, place // 16]
    return _half(raw, 80) * (scale & 15) * _two(b, 16, place) - _half(raw, 82) * (scale >> 4)


def _q3_k(b, raw, place):
    group = place // 16
    low = b[:, 96 + group % 8] >> (4 * (group // 8)) & 15
    high = b[:, 104 + group % 4] >> (2 * (group // 4)) & 3
    missing = 4 * (1 - (b[:, place % 32] >> (place // 32) & 1))
    return _half(raw, 108) * ((low | high << 4) - 32) * (_two(b, 32, place) - missing)


def _q4_k(b, raw, place):
    scale, least = _six_bits(b, 4, place // 32)
    return _half(raw, 0) * scale * _four(b, 16, place) - _half(raw, 2) * least


def _q5_k(b, raw, place):
    scale, least = _six_bits(b, 4, place // 32)
    fifth = b[:, 16 + place % 32] >> (place // 32) & 1
    return _half(raw, 0) * scale * (_four(b, 48, place) | fifth << 4) - _half(raw, 2) * least


def _q6_k(b, raw, place):
    half, within = divmod(place, 128)
    low = b[:, 64 * half + within % 64] >> (4 * (within // 64)) & 15
    high = b[:, 128 + 32 * half + within % 32] >> (2 * (within // 32)) & 3
    scale = raw[:, 192 + place // 16].view(np.int8)
    return _half(raw, 208) * scale * ((low | high << 4) - 32)


_WEIGHT = {
    "Q4_0": lambda b, raw, place: _half(raw, 0) * (_nibble(b, 2, place) - 8),
    "Q4_1": lambda b, raw, place: _half(raw, 0) * _nibble(b, 4, place) + _half(raw, 2),
    "Q8_0": lambda b, raw, place: _half(raw, 0) * raw[:, 2 + place].view(np.int8),
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
