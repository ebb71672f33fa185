"""Quantised checkpoints are read as the weights that they stand for."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.errors import VocabtrimError
from vocabtrim_export.sources.packed_weights import READERS
from vocabtrim_export.sources.source import load_source

GROUP = 16
COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}


def packed(values, axis, order=range(8)):
    """int [a, b] of 4 bits each → int32, eight along `axis` in one, `order[i]`th in the nibble i."""
    if axis == 0:
        return packed(values.T, 1, order).T.contiguous()
    rows = [
        [sum(int(row[start + place]) << (4 * i) for i, place in enumerate(order)) for start in range(0, len(row), 8)]
        for row in values.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)  # wraps round


def quantised(weight):
    """q, zeros: int [out, in], [out, groups]; scales: float16 [out, groups]; and what they stand for."""
    generator = torch.Generator().manual_seed(weight.numel())
    out, size = weight.shape
    q = torch.randint(0, 16, (out, size), generator=generator)
    zeros = torch.randint(1, 16, (out, size // GROUP), generator=generator)
    scales = (torch.rand(out, size // GROUP, generator=generator) / 64 + 0.01).half()
    spread = [x.repeat_interleave(GROUP, 1) for x in (zeros, scales)]
    return q, zeros, scales, (q - spread[0]) * spread[1].float()


def gptq(weight):
    q, zeros, scales, dense = quantised(weight)
    shuffled = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))  # as by activation order
    groups = torch.arange(weight.shape[1]) // GROUP
    parts = {"qweight": packed(q[:, shuffled].T, 0), "qzeros": packed((zeros - 1).T, 1), "scales": scales.T}
    return parts | {"g_idx": groups[shuffled].int()}, dense[:, shuffled]


def gptq_v2(weight):
    """As `gptq`, with zero points that are stored as they are."""
    parts, dense = gptq(weight)
    return parts | {"qzeros": packed(quantised(weight)[1].T, 1)}, dense


def awq(weight):
    q, zeros, scales, dense = quantised(weight)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": packed(q.T, 1, order), "qzeros": packed(zeros.T, 1, order), "scales": scales.T}, dense


def awq_gemv(weight):
    """Rows of packed inputs; the kernels want a width of groups that more than fills the row's, with anything in it."""
    q, zeros, scales, dense = quantised(weight)
    extra = 16 - zeros.shape[1]
    zeros, scales = (torch.cat([x, torch.full((len(x), extra), 7, dtype=x.dtype)], 1) for x in (zeros, scales))
    return {"qweight": packed(q, 1), "qzeros": packed(zeros, 1), "scales": scales}, dense


def float4(weight, block):
    """Bytes, [out, in / 2], of two random numbers each, and the numbers [out, in / block, block]."""
    q = torch.randint(0, 16, weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    magnitudes = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12])[q & 7] / 2
    return (q[:, ::2] | q[:, 1::2] << 4).to(torch.uint8), torch.where(q < 8, magnitudes, -magnitudes).unflatten(
        1, (-1, block)
    )


def nvfp4(names, is_divided):
    """A float8 scale for each 16 numbers, and one for all: a divisor in compressed-tensors, a factor in ModelOpt."""

    def quantise(weight):
        packed_bytes, numbers = float4(weight, 16)
        scales = (torch.rand(numbers.shape[:2], generator=torch.Generator().manual_seed(3)) + 0.5).to(
            torch.float8_e4m3fn
        )
        whole = torch.tensor(24.0 if is_divided else 0.03)
        parts = dict(zip(names, (packed_bytes, scales, whole), strict=True)) | {"input_scale": torch.tensor(0.5)}
        return parts, (numbers * scales.float()[..., None] * (1 / whole if is_divided else whole)).flatten(1)

    return quantise


def compressed_mxfp4(weight):
    packed_bytes, numbers = float4(weight, 32)
    exponents = torch.randint(-8, -2, numbers.shape[:2], generator=torch.Generator().manual_seed(4))
    parts = {"weight_packed": packed_bytes, "weight_scale": (exponents + 127).to(torch.uint8)}
    return parts, (numbers * 2.0 ** exponents[..., None]).flatten(1)


def compressed(weight):
    q, zeros, scales, dense = quantised(weight)
    parts = {"weight_packed": packed(q, 1), "weight_scale": scales, "weight_zero_point": packed(zeros, 0)}
    return parts | {"weight_shape": torch.tensor(weight.shape)}, dense


def compressed_int8(weight):
    generator = torch.Generator().manual_seed(weight.numel())
    q = torch.randint(-128, 128, weight.shape, generator=generator).to(torch.int8)
    scales = torch.rand(len(q), 1, generator=generator) / 64 + 0.01
    return {"weight": q, "weight_scale": scales}, q.float() * scales


BLOCK = [48, 40]


def fp8(scales_name, block=BLOCK):
    def quantise(weight):
        """float8 with a scale for each block of 48 rows and 40 columns; the last blocks are smaller."""
        generator = torch.Generator().manual_seed(weight.numel())
        q = (torch.randn(weight.shape, generator=generator) * 50).to(torch.float8_e4m3fn)
        scales = torch.rand([-(-size // of) for size, of in zip(q.shape, block, strict=True)], generator=generator)
        spread = scales.repeat_interleave(block[0], 0)[: len(q)].repeat_interleave(block[1], 1)[:, : q.shape[1]]
        return {"weight": q, scales_name: scales}, q.float() * spread

    return quantise


def auto_fp8(weight):
    """float8 with one scale by the name that AutoFP8 gives it, and the scale of its input."""
    q, scale = (weight * 50).to(torch.float8_e4m3fn), torch.tensor(0.03)
    return {"weight": q, "weight_scale": scale, "input_scale": torch.tensor(0.5)}, q.float() * scale


def fp8_by_row(weight):
    q = (weight * 50).to(torch.float8_e4m3fn)
    scales = torch.rand(len(q), 1, generator=torch.Generator().manual_seed(5)) + 0.01
    return {"weight": q, "weight_scale": scales}, q.float() * scales


def bitsandbytes(kind, is_nested=False, stored_as=torch.uint8):
    """Numbers of 4 bits in blocks of 64 of the flattened matrix; the blocks' largest magnitudes may be 8-bit ones."""

    def quantise(weight):
        generator = torch.Generator().manual_seed(weight.numel())
        q = torch.randint(0, 16, (weight.numel(),), generator=generator)
        table = torch.linspace(-1, 1, 16) ** 3
        largest = torch.rand(-(-len(q) // 64), generator=generator) + 0.5
        packed_bytes = (q[::2] << 4 | q[1::2]).to(torch.uint8)
        state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        parts = {"weight": packed_bytes.view(stored_as)[:, None], "weight.absmax": largest, "weight.quant_map": table}
        if is_nested:
            state |= {"nested_blocksize": 32, "nested_dtype": "float32", "nested_offset": 0.75}
            q8 = torch.randint(0, 256, largest.shape, generator=generator)
            scales, bytes_table = torch.rand(-(-len(q8) // 32), generator=generator), torch.linspace(-1, 1, 256)
            largest = bytes_table[q8] * scales.repeat_interleave(32)[: len(q8)] + 0.75
            parts |= {"weight.absmax": q8.to(torch.uint8), "weight.nested_absmax": scales}
            parts |= {"weight.nested_quant_map": bytes_table}
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        dense = table[q] * largest.repeat_interleave(64)[: len(q)]
        return parts | {f"weight.quant_state.bitsandbytes__{kind}": text}, dense.view(weight.shape)

    return quantise


def llm_int8(weight):
    q = torch.randint(-127, 128, weight.shape, generator=torch.Generator().manual_seed(weight.numel())).to(torch.int8)
    largest = torch.rand(len(q), generator=torch.Generator().manual_seed(6)) + 0.1
    parts = {"weight": q, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, q.float() * largest[:, None] / 127


AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": False, "data_type": "int"}
COMPRESSED_NVFP4 = nvfp4(("weight_packed", "weight_scale", "weight_global_scale"), is_divided=True)
MODELOPT_NVFP4 = nvfp4(("weight", "weight_scale", "weight_scale_2"), is_divided=False)
BNB = {"quant_method": "bitsandbytes", "_load_in_4bit": True, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FORMS = {
    "bitsandbytes, nf4": (bitsandbytes("nf4"), BNB),
    "bitsandbytes, nested nf4": (bitsandbytes("nf4", is_nested=True), BNB | {"bnb_4bit_use_double_quant": True}),
    "bitsandbytes, fp4 in bfloat16": (bitsandbytes("fp4", stored_as=torch.bfloat16), BNB),
    "bitsandbytes, int8": (llm_int8, {"quant_method": "bitsandbytes", "_load_in_8bit": True, "load_in_8bit": True}),
    "awq, gemv": (awq_gemv, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "GEMV"}),
    "auto-round as gptq": (gptq, AUTO_ROUND | {"packing_format": "auto_round:auto_gptq"}),
    "auto-round of its own": (gptq_v2, AUTO_ROUND | {"packing_format": "auto_round"}),
    "auto-round as gptqmodel": (gptq_v2, AUTO_ROUND | {"packing_format": "auto_round:gptqmodel"}),
    "auto-round as awq": (awq, AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}),
    "auto-round, nvfp4": (COMPRESSED_NVFP4, AUTO_ROUND | {"packing_format": "auto_round:llm_compressor"}),
    "compressed-tensors, nvfp4": (
        COMPRESSED_NVFP4,
        COMPRESSED | {"format": "nvfp4-pack-quantized"},
    ),
    "compressed-tensors, mxfp4": (compressed_mxfp4, COMPRESSED | {"format": "mxfp4-pack-quantized"}),
    "modelopt, nvfp4": (MODELOPT_NVFP4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "fbgemm": (fp8_by_row, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "quark": (auto_fp8, {"quant_method": "quark", "export": {"pack_method": "reorder"}}),
    "modelopt, fp8": (auto_fp8, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "gptq, stated by format": (gptq_v2, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "format": "gptq_v2"}),
    "fp8 of AutoFP8": (auto_fp8, {"quant_method": "fp8", "activation_scheme": "static"}),
    "compressed-tensors of several groups": (
        compressed,
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"weights": {"weights": {"num_bits": 4}}, "activations": {"weights": None}},
        },
    ),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "compressed-tensors": (compressed, COMPRESSED),
    "compressed-tensors, int8": (compressed_int8, COMPRESSED),
    "compressed-tensors, fp8": (
        fp8("weight_scale"),
        COMPRESSED | {"config_groups": {"group_0": {"weights": {"num_bits": 8, "block_structure": BLOCK}}}},
    ),
    "fp8": (fp8("weight_scale_inv"), {"quant_method": "fp8", "weight_block_size": BLOCK}),
}


@pytest.fixture
def checkpoint(random_model, tmp_path):
    """checkpoint(form) → a directory whose layers are quantised so, and the weights that it stands for."""

    def make(form, **changes):
        quantise, config = FORMS[form]
        source, place = random_model("qwen2"), tmp_path / "quantised"
        shutil.copytree(source, place)
        stored, dense = {}, load_file(source / "model.safetensors")
        for name, tensor in dense.items():
            if tensor.ndim == 2 and ".layers." in name:
                parts, dense[name] = quantise(tensor)
                stored |= {name.removesuffix("weight") + key: part.contiguous() for key, part in parts.items()}
            else:
                stored[name] = tensor
        save_file(stored, place / "model.safetensors", {"format": "pt"})
        described = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(described | {"quantization_config": config | changes}))
        return place, dense

    return make


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_checkpoint_is_the_weights_it_stands_for(form, checkpoint):
    place, dense = checkpoint(form)
    (place / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    source = load_source(str(place), torch.float32)
    assert source.eos_token_ids == (1, 7)
    found = source.model.state_dict()
    assert dense.keys() == found.keys()
    for name, wanted in dense.items():
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("gptq", {"bits": 3}, "weights of 3 bits are not read"),
        ("gptq", {"checkpoint_format": "marlin"}, "the layouts gptq and gptq_v2 in int32 are read, this is marlin"),
        ("awq", {"group_size": 32}, "6 groups of 32 do not make 96"),
        ("compressed-tensors", {"transform_config": {"config_groups": {"R3": {}}}}, "weights that are rotated"),
        ("fp8", {"quant_method": "torchao"}, "is quantised by torchao, which is not read"),
        ("awq", {"version": "gemv_fast"}, "only the 4-bit GEMM and GEMV layouts of AWQ are read"),
        ("awq, gemv", {"group_size": None}, "config.json states no size of its groups"),
        (
            "auto-round as awq",
            {"packing_format": "auto_round:fp8"},
            "packed as GPTQ or AWQ are read, not auto_round:fp8",
        ),
        ("auto-round as gptq", {"bits": 8}, "up_proj are not understood|down_proj are not understood"),
        ("gptq", {"bits": "4"}, "weights of '4' bits are not read"),
        (
            "compressed-tensors, fp8",
            {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
            "config.json states no size for its 2 groups of 96 numbers",
        ),
        ("compressed-tensors", {"config_groups": {}}, r"weights of \[\] bits are not read"),
    ],
)
def test_forms_that_are_not_read_are_refused(form, changes, message, checkpoint):
    with pytest.raises(VocabtrimError, match=message):
        load_source(str(checkpoint(form, **changes)[0]), torch.float32)


@pytest.mark.parametrize(
    ("form", "part", "message"),
    [
        (
            "compressed-tensors, nvfp4",
            "weight_global_scale",
            "nvfp4 and mxfp4 are read, not nvfp4-pack-quant",
        ),
        ("modelopt, nvfp4", "weight_scale_2", "there is no weight_scale_2"),
    ],
)
def test_floats_of_4_bits_without_their_scale_are_refused(form, part, message, checkpoint):
    place, _ = checkpoint(form)
    stored = load_file(place / "model.safetensors")
    rest = {name: tensor for name, tensor in stored.items() if not name.endswith(part)}
    save_file(rest, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(VocabtrimError, match=message):
        load_source(str(place), torch.float32)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        # int4 of ModelOpt's AWQ: [out / 2, in], with a scale for 128 inputs
        ({"weight": (32, 256), "weight_scale": (64, 2), "weight_scale_2": ()}, "do not belong together"),
        ({"weight": (64, 64), "weight_scale": (64, 3), "weight_scale_2": ()}, "do not belong together"),
    ],
)
def test_bytes_of_another_layout_are_not_taken_for_nvfp4(parts, message):
    tensors = {name: torch.ones(shape, dtype=torch.uint8) for name, shape in parts.items()}
    with pytest.raises(IndexError, match=message):
        READERS["modelopt"](tensors, {})


def test_integers_of_quark_are_refused():
    parts = {"weight": torch.ones(64, 64, dtype=torch.int8), "weight_scale": torch.ones(64, 1)}
    with pytest.raises(IndexError, match=r"numbers of int8 with scales \[64, 1\]"):
        READERS["quark"](parts, {})


def test_blocks_of_modelopts_fp8_are_refused():
    parts = {"weight": torch.ones(256, 256).to(torch.float8_e4m3fn), "weight_scale": torch.ones(2, 1, 2, 1)}
    with pytest.raises(IndexError, match=r"float8_e4m3fn with scales \[2, 1, 2, 1\]"):
        READERS["modelopt"](parts, {})


def test_modelopts_first_releases_state_the_quantisation_in_a_file_of_its_own(checkpoint):
    place, dense = checkpoint("modelopt, nvfp4")
    described = json.loads((place / "config.json").read_text())
    del described["quantization_config"]
    (place / "config.json").write_text(json.dumps(described))
    stated = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}}
    (place / "hf_quant_config.json").write_text(json.dumps(stated))
    stored = load_file(place / "model.safetensors")
    scales = {f"model.layers.0.self_attn.{which}_proj.{which}_scale": torch.tensor(0.5) for which in "kv"}
    save_file(stored | scales, place / "model.safetensors", {"format": "pt"})
    source = load_source(str(place), torch.float32)
    assert "scales for a KV cache of 8 bits" in source.notes[0]
    found = source.model.state_dict()
    for name, wanted in dense.items():
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-6, msg=name)


def test_blocks_of_fp8_that_no_config_states_are_those_that_transformers_takes():
    from transformers import FineGrainedFP8Config

    block = FineGrainedFP8Config().weight_block_size
    parts, dense = fp8("weight_scale_inv", block)(torch.zeros(192, 320))
    torch.testing.assert_close(READERS["fp8"](parts, {"quant_method": "fp8"}), dense)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_integers_that_nothing_explains_are_no_weights(dtype, random_model):
    place, name = random_model("qwen2"), "model.layers.1.mlp.up_proj.weight"
    stored = load_file(place / "model.safetensors")
    save_file(stored | {name: (stored[name] * 50).to(dtype)}, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(VocabtrimError, match=rf"stores {name} as [A-Z0-9]+, and its config.json has no quantization"):
        load_source(str(place), torch.float32)


def test_scales_of_a_quantised_kv_cache_are_left_with_a_note(checkpoint):
    place, dense = checkpoint("fp8 of AutoFP8")
    stored = load_file(place / "model.safetensors")
    scales = {f"model.layers.{i}.self_attn.{which}_scale": torch.tensor(0.5) for i in (0, 1) for which in "kv"}
    save_file(stored | scales, place / "model.safetensors", {"format": "pt"})
    source = load_source(str(place), torch.float32)
    assert "scales for a KV cache of 8 bits" in source.notes[0]
    assert dense.keys() == source.model.state_dict().keys()


def test_plain_tensors_beside_a_quantised_config_are_read_and_named(random_model):
    place = random_model("qwen2")
    described = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(described | {"quantization_config": {"quant_method": "fp8"}}))
    source = load_source(str(place), torch.float32)
    assert "is quantised by fp8, its tensors are not: they are exported" in source.notes[0]
    wanted = load_file(place / "model.safetensors")
    torch.testing.assert_close(source.model.state_dict()["lm_head.weight"], wanted["lm_head.weight"])


def test_parts_that_do_not_fit_are_named(checkpoint):
    place, _ = checkpoint("awq")
    stored = load_file(place / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.qzeros"]
    save_file(stored, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(VocabtrimError, match=r"model\.layers\.1\.mlp\.up_proj are not understood: there is no qzeros"):
        load_source(str(place), torch.float32)


def mxfp4(weight):
    """Random blocks and scales for experts [experts, in, out], and the weights that they stand for."""
    generator = torch.Generator().manual_seed(weight.numel())
    count, size, out = weight.shape
    q = torch.randint(0, 16, (count, out, size // 32, 32), generator=generator)
    exponents = torch.randint(-8, -2, (count, out, size // 32), generator=generator)
    magnitudes = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12])[q & 7] / 2
    dense = torch.where(q < 8, magnitudes, -magnitudes) * 2.0 ** exponents[..., None]
    blocks = (q[..., ::2] | q[..., 1::2] << 4).to(torch.uint8)
    return blocks, (exponents + 127).to(torch.uint8), dense.flatten(2).transpose(1, 2).contiguous()


@pytest.fixture
def mxfp4_checkpoint(random_model):
    """A gpt-oss model whose experts are packed, and the weights that it stands for."""
    place = random_model("gpt_oss")
    stored = load_file(place / "model.safetensors")
    dense = dict(stored)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales, dense[name] = mxfp4(stored.pop(name))
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(stored, place / "model.safetensors", {"format": "pt"})
    described = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(described | {"quantization_config": {"quant_method": "mxfp4"}}))
    return place, dense


def test_mxfp4_experts_are_the_weights_they_stand_for(mxfp4_checkpoint):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    place, dense = mxfp4_checkpoint
    stored = load_file(place / "model.safetensors")
    read = load_source(str(place), torch.float32).model.state_dict()
    assert read.keys() == dense.keys()
    for name, wanted in dense.items():
        assert torch.equal(read[name], wanted), name
        if f"{name}_blocks" in stored:
            theirs = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"], dtype=torch.float32)
            assert torch.equal(read[name], theirs)


def test_a_checkpoint_of_mixed_quantisation_is_one_line(mxfp4_checkpoint, checkpoint):
    place, dense = mxfp4_checkpoint
    stored = load_file(place / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(stored | {name: dense[name].to(torch.float8_e4m3fn)}, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(VocabtrimError, match=r"mixed quantisation is not read: .*q_proj\.weight is float8_e4m3fn"):
        load_source(str(place), torch.float32)
    groups = {name: {"weights": {"num_bits": bits}} for name, bits in (("a", 4), ("b", 8))}
    with pytest.raises(VocabtrimError, match=r"mixed quantisation, of \[4, 8\] bits, is not read"):
        load_source(str(checkpoint("compressed-tensors", config_groups=groups)[0]), torch.float32)
