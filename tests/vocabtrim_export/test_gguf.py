"""GGUF files are read as the weights that they stand for, whatever llama.cpp quantised them to."""

import json

import gguf
import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engines.errors import VocabtrimError
from tests.integration.conftest import check_logits
from tests.vocabtrim_export.gguf_blocks import SCALES, dense, random_blocks
from vocabtrim_export.calibration import TokenCounts, counting
from vocabtrim_export.calibration.counting import CalibrationSettings
from vocabtrim_export.drafters.shared_tokens import proposable_tokens
from vocabtrim_export.pipeline import export
from vocabtrim_export.settings import ExportSettings
from vocabtrim_export.sources.gguf_header import read_header
from vocabtrim_export.sources.gguf_model import _turn
from vocabtrim_export.sources.gguf_rotation import rope_parameters
from vocabtrim_export.sources.gguf_weights import _model_names
from vocabtrim_export.sources.source import load_source

HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB = 256, 2, 4, 2, 448
HEAD = HIDDEN // HEADS
SHAPES = {  # GGUF's name → transformers' name, shape
    "attn_q": ("self_attn.q_proj", HIDDEN),
    "attn_k": ("self_attn.k_proj", KV_HEADS * HEAD),
    "attn_v": ("self_attn.v_proj", KV_HEADS * HEAD),
    "attn_output": ("self_attn.o_proj", HIDDEN),
    "ffn_gate": ("mlp.gate_proj", HIDDEN),
    "ffn_up": ("mlp.up_proj", HIDDEN),
    "ffn_down": ("mlp.down_proj", HIDDEN),
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def halves(weight):
    """llama.cpp rotates neighbours (2i, 2i + 1), transformers the halves (i, i + d/2) of a head: rows change places."""
    order = [row // HEAD * HEAD + row % (HEAD // 2) * 2 + row % HEAD // (HEAD // 2) for row in range(len(weight))]
    return weight[order]


@pytest.fixture
def gguf_file(tmp_path, tokenizer):
    """gguf_file(kind of a tensor's name, rope_factors, **metadata) → a file, and the weights that it stands for."""

    def make(kind_of, rope_factors=None, scaling=None, extra=(), heads=HEADS, says=lambda writer: None):
        generator = np.random.default_rng(0)
        path, wanted = tmp_path / "model.gguf", {}
        writer = gguf.GGUFWriter(path, "llama")
        describe(writer, tokenizer, heads)
        says(writer)
        for name, numbers in dict(extra).items():
            writer.add_tensor(name, numbers)
        if scaling:
            writer.add_rope_scaling_type(scaling)
            writer.add_rope_scaling_factor(4.0)
        if rope_factors is not None:
            writer.add_tensor("rope_freqs.weight", rope_factors)

        def matrix(name, there, rows, order=lambda weight: weight, columns=HIDDEN):
            kind = kind_of(name)
            blocks = random_blocks(kind, rows, columns, generator)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
            wanted[there] = order(dense(kind, blocks, columns))

        def norm(name, there):
            wanted[there] = generator.normal(1, 0.2, HIDDEN).astype(np.float32)
            writer.add_tensor(name, wanted[there])

        matrix("token_embd.weight", "model.embed_tokens.weight", VOCAB)
        matrix("output.weight", "lm_head.weight", VOCAB)
        norm("output_norm.weight", "model.norm.weight")
        for layer in range(LAYERS):
            for name, (there, rows) in SHAPES.items():
                order = halves if name in ("attn_q", "attn_k") else lambda weight: weight
                rows = heads * HEAD if name == "attn_q" else rows
                columns = heads * HEAD if name == "attn_output" else HIDDEN
                matrix(f"blk.{layer}.{name}.weight", f"model.layers.{layer}.{there}.weight", rows, order, columns)
            for name, there in NORMS.items():
                norm(f"blk.{layer}.{name}.weight", f"model.layers.{layer}.{there}.weight")
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        return path, {name: torch.from_numpy(weight) for name, weight in wanted.items()}

    return make


def describe(writer, tokenizer, heads=HEADS):
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(heads)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    tokens = [words.get(number, f"[PAD{number}]") for number in range(VOCAB)]  # as llama.cpp's converter writes them
    special = set(tokenizer.all_special_tokens) | {word for word in tokens if word.startswith("<|")}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if word in special else 5 if word.startswith("[PAD") else 1 for word in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(tokenizer.chat_template)


def medium(name):
    """Q4_K_M as llama.cpp writes it: the head and half of what is most sensitive in six bits."""
    return "Q6_K" if name in ("output.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight") else "Q4_K"


@pytest.mark.parametrize("kind", SCALES)
def test_each_type_is_the_weights_it_stands_for(kind, gguf_file):
    path, wanted = gguf_file(lambda _: kind)
    source = load_source(str(path), torch.float32)
    found = source.model.state_dict()
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=2e-6, atol=1e-7, msg=name)
    assert source.eos_token_ids == (1,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_equal_those_of_transformers_own_loader_bit_for_bit(dtype, gguf_file):
    path, _ = gguf_file(medium)
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    read = []
    source = load_source(str(path), dtype, lambda done, total: read.append((done, total)))
    wanted, found = reference.state_dict(), source.model.state_dict()
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name
    assert read == sorted(read)
    assert read[0] == (0, path.stat().st_size)
    assert read[-1] == (path.stat().st_size, path.stat().st_size)


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "gemma3_text", "qwen2_moe"])
def test_tensors_have_the_names_that_transformers_gives_them(kind):
    text = {"num_hidden_layers": 1, "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**text))
    processor = TENSOR_PROCESSORS.get(kind.removesuffix("_text").replace("_", ""), TensorProcessor)()
    assert _model_names(model, processor) == get_gguf_hf_weights_map(model, processor)


def test_counting_a_text_loads_no_weights(gguf_file, tmp_path, monkeypatch):
    path, _ = gguf_file(medium)
    text, output = tmp_path / "text.txt", tmp_path / "counts.safetensors"
    text.write_text("The cat sat on the mat. " * 40)
    monkeypatch.setattr(counting, "load_source", None)
    settings = CalibrationSettings((text,), "text", 50)
    assert counting.calibrate_models(None, str(path), output, settings).total == 50


def test_a_mixed_file_runs_as_its_weights_do(gguf_file, tmp_path):
    path, wanted = gguf_file(medium)
    numbers = np.random.default_rng(0).permutation(VOCAB)
    digest, counts = load_source(str(path), torch.float32).tokenizer_digest, tmp_path / "counts.safetensors"
    TokenCounts(numbers, numbers, digest, ()).save(counts)
    calibration = CalibrationSettings(calibration=(counts,))
    settings = ExportSettings(k=192, max_length=128, calibration=calibration)
    result = export(str(path), str(path), tmp_path / "out", settings)
    model = LlamaForCausalLM(config()).eval()
    model.load_state_dict(wanted)
    ids = torch.randint(0, 400, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits[0].numpy()
    for bundle in (result.target, result.drafter):
        check_logits(bundle, ids[0].numpy(), logits, [(24, 24), (1, 1), (5, 5), (1, 1), (17, 3)])


def test_a_file_and_a_directory_draft_for_each_other(gguf_file, tokenizer, tmp_path):
    """Whatever the one calls its rows without a token, and however many the other has."""
    path, _ = gguf_file(lambda _: "Q8_0")
    shape = config()
    shape.vocab_size = VOCAB + 64
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    sides = [load_source(str(place), torch.float32) for place in (path, tmp_path / "dense")]
    for drafter, target in (sides, sides[::-1]):
        shared = proposable_tokens(drafter, target)
        assert (shared.token_ids.tolist(), shared.differing) == (list(range(VOCAB)), 0)


def config(**rotation):
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0} | rotation,
    )


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_llama3s_rotation_comes_from_its_divisors(gguf_file):
    """llama.cpp stores the factors in a tensor of its own and does not name the rule that they come from."""
    plain, wanted = LlamaRotaryEmbedding(config()).inv_freq, LlamaRotaryEmbedding(config(**LLAMA3)).inv_freq
    path, _ = gguf_file(lambda _: "Q8_0", rope_factors=(plain / wanted).numpy())
    found = load_source(str(path), torch.float32).model.model.rotary_emb.inv_freq
    assert not torch.allclose(plain, wanted)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "says",
    [
        lambda writer: writer.add_rope_scaling_factor(4.0),  # linear where nothing else is said, as in llama.cpp
        lambda writer: (writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), writer.add_rope_scaling_factor(4.0)),
        lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0),  # files of 2023
    ],
)
def test_positions_that_a_file_divides_are_divided(says, gguf_file):
    path, _ = gguf_file(lambda _: "Q8_0", says=says)
    found = load_source(str(path), torch.float32).model.model.rotary_emb.inv_freq
    torch.testing.assert_close(found, LlamaRotaryEmbedding(config()).inv_freq / 4)


def test_yarn_is_the_rotation_that_llama_cpp_computes(gguf_file):
    """The file's factor of the queries and keys multiplies the one that follows from its lengths."""

    def says(writer):
        writer.add_rope_scaling_orig_ctx_len(32)
        writer.add_rope_scaling_attn_factors(1.25)
        writer.add_float32("llama.rope.scaling.yarn_beta_fast", 8.0)

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0}
    wanted = LlamaRotaryEmbedding(config(**yarn))
    path, _ = gguf_file(lambda _: "Q8_0", scaling=gguf.RopeScalingType.YARN, says=says)
    rotary = load_source(str(path), torch.float32).model.model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, wanted.inv_freq)
    assert rotary.attention_scaling == pytest.approx(1.25 * wanted.attention_scaling)


def random_decoder(kind, **settings):
    shape = {key: getattr(config(), key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    shape |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    settings = {"num_hidden_layers": LAYERS, "max_position_embeddings": 256, "initializer_range": 0.3} | settings
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape, **settings)).eval()


def write_gguf(path, model, kind, tokenizer, says):
    """Write a model as llama.cpp's converter does, where it leaves the tensors as they are but for Gemma's norms."""
    writer = gguf.GGUFWriter(path, kind)
    describe(writer, tokenizer)
    writer.add_pad_token_id(1)
    for key in ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "block_count"):
        writer.kv_data[0].pop(f"{kind}.{key}")
    writer.add_block_count(layers := model.config.num_hidden_layers)
    says(writer)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(architecture, layers)
    for name, weight in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        is_raised = kind in ("gemma3", "nemotron") and name.endswith("norm.weight")
        if ".experts." in name:
            parts = ("gate", "up") if leaf == "gate_up_proj" else ("down",)
            for part, matrices in zip(parts, weight.chunk(len(parts), dim=1), strict=True):
                writer.add_tensor(f"{names.get_name(f'{module}.{part}_proj')}.weight", matrices.contiguous().numpy())
            continue
        weight = weight[0] if name.endswith("shared_expert_gate.weight") else weight
        writer.add_tensor(f"{names.get_name(module)}.{leaf}", (weight + 1 if is_raised else weight).numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def check_file(path, model, lengths):
    found = load_source(str(path), torch.float32).model
    for length in lengths:
        ids = torch.randint(0, 400, (1, length), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(found(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-3)


def test_phi_4_minis_two_tables_for_a_part_of_a_head(tokenizer, tmp_path):
    """Its file says how many numbers of a head are rotated, and has a tensor of divisors for each range of lengths."""
    tables = {f"{name}_factor": np.linspace(1, last, 24).tolist() for name, last in (("short", 2), ("long", 9))}
    rotation = {"rope_type": "longrope", "partial_rotary_factor": 0.75, "original_max_position_embeddings": 32} | tables
    model = random_decoder("phi3", rope_parameters=rotation, original_max_position_embeddings=32)

    def says(writer):
        writer.add_rope_dimension_count(48)
        writer.add_rope_scaling_orig_ctx_len(32)
        writer.add_rope_scaling_attn_factors(model.model.rotary_emb.attention_scaling)
        for name, divisors in tables.items():
            writer.add_tensor(f"rope_factors_{name.removesuffix('_factor')}.weight", np.array(divisors, np.float32))

    write_gguf(tmp_path / "model.gguf", model, "phi3", tokenizer, says)
    check_file(tmp_path / "model.gguf", model, [32, 48])  # the short tables, the long ones


def test_the_layers_with_a_window_and_their_rotation_are_those_that_a_file_names(tokenizer, tmp_path):
    """By default transformers' Gemma 3 takes five layers of six and a base of 10,000."""
    rotations = {"full_attention": {"rope_theta": 5e4}, "sliding_attention": {"rope_theta": 100.0}}
    model = random_decoder(
        "gemma3_text",
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={name: {"rope_type": "default"} | each for name, each in rotations.items()},
        **{"sliding_window": 8, "head_dim": HEAD, "query_pre_attn_scalar": HEAD, "rms_norm_eps": 1e-2},
    )

    def says(writer):
        for key, value in (("rope.freq_base", 5e4), ("rope.freq_base_swa", 100.0)):
            writer.add_float32(f"gemma3.{key}", value)
        writer.add_sliding_window(8)
        writer.add_sliding_window_pattern([True, False, True])
        writer.add_key_length(HEAD)
        writer.add_layer_norm_rms_eps(1e-2)

    write_gguf(tmp_path / "model.gguf", model, "gemma3", tokenizer, says)
    check_file(tmp_path / "model.gguf", model, [24])


def test_the_epsilon_of_a_norm_that_is_no_rms_norm(tokenizer, tmp_path):
    model = random_decoder("nemotron", norm_eps=0.1)

    def says(writer):
        writer.add_rope_dimension_count(32)
        writer.add_layer_norm_eps(0.1)

    write_gguf(tmp_path / "model.gguf", model, "nemotron", tokenizer, says)
    check_file(tmp_path / "model.gguf", model, [24])


@pytest.mark.parametrize("kind", ["qwen2moe", "qwen3moe"])
def test_experts_have_the_size_that_the_file_states(kind, tokenizer, tmp_path):
    """transformers takes it from the defaults of its configuration: other sizes of a family could not be read."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    sizes |= {"shared_expert_intermediate_size": 96} if kind == "qwen2moe" else {"norm_topk_prob": True}
    model = random_decoder(kind.replace("moe", "_moe"), **sizes)

    def says(writer):
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(32)
        if kind == "qwen2moe":
            writer.add_expert_shared_feed_forward_length(96)
        writer.add_key_length(HEAD)
        writer.add_layer_norm_rms_eps(1e-6)

    write_gguf(tmp_path / "model.gguf", model, kind, tokenizer, says)
    check_file(tmp_path / "model.gguf", model, [24])


def test_layers_with_a_window_keep_their_rotation(gguf_file):
    """Gemma 3's larger models have such files."""
    path, _ = gguf_file(lambda _: "Q8_0", says=lambda writer: writer.add_rope_scaling_factor(8.0))
    gemma, header = CONFIG_MAPPING["gemma3_text"](), read_header(path)
    before = dict(gemma.rope_parameters["sliding_attention"])
    _turn(gemma, rope_parameters(header), header)
    wanted = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    assert gemma.rope_parameters == {"sliding_attention": before, "full_attention": wanted}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scaling": gguf.RopeScalingType.LONGROPE}, r"scales its rotation \(longrope\)"),
        ({"says": lambda writer: writer.add_rope_scaling_attn_factors(1.2)}, r"scales its rotation"),
        ({"rope_factors": np.linspace(1, 8, HEAD // 2, dtype=np.float32)}, "in another way than Llama 3"),
    ],
)
def test_a_rotation_that_would_be_lost_is_refused(given, message, gguf_file):
    path, _ = gguf_file(lambda _: "Q8_0", **given)
    with pytest.raises(VocabtrimError, match=message):
        load_source(str(path), torch.float32)


def biases(sizes):
    return {
        f"blk.{layer}.{name}.bias": np.linspace(-1, 1, size, dtype=np.float32)
        for layer in range(LAYERS)
        for name, size in sizes.items()
    }


def test_attention_biases_are_read_and_one_that_the_file_lacks_is_zero(gguf_file):
    sizes = {"attn_q": HIDDEN, "attn_k": KV_HEADS * HEAD, "attn_v": KV_HEADS * HEAD}
    path, _ = gguf_file(lambda _: "Q8_0", extra=biases(sizes))
    layer = load_source(str(path), torch.float32).model.model.layers[1].self_attn
    given = torch.linspace(-1, 1, KV_HEADS * HEAD)
    torch.testing.assert_close(layer.v_proj.bias.detach(), given)
    torch.testing.assert_close(layer.k_proj.bias.detach(), torch.from_numpy(halves(given.numpy())))
    assert not layer.o_proj.bias.any()


@pytest.mark.parametrize("name", ["blk.0.attn_q_norm.weight", "blk.1.ffn_gate_inp.weight", "side.weight"])
def test_a_tensor_that_nothing_reads_is_named(name, gguf_file):
    path, _ = gguf_file(lambda _: "Q8_0", extra={name: np.ones(HEAD, np.float32)})
    with pytest.raises(VocabtrimError, match=f"nothing reads {name} in "):
        load_source(str(path), torch.float32)


def test_a_head_of_another_size_than_the_models_width_over_its_heads(gguf_file):
    """Eight heads of 64 numbers in a model that is 256 wide: the file says so by `attention.key_length`."""
    path, wanted = gguf_file(
        lambda _: "Q8_0", heads=8, says=lambda w: (w.add_key_length(HEAD), w.add_value_length(HEAD), turn(w, None))
    )
    found = load_source(str(path), torch.float32).model.state_dict()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=2e-6, atol=1e-7, msg=name)


def turn(writer, size):
    writer.kv_data[0].pop("llama.rope.dimension_count")
    if size is not None:
        writer.add_rope_dimension_count(size)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (lambda w: w.add_logit_scale(0.5), "scales by logit_scale"),
        (lambda w: w.add_final_logit_softcapping(30.0), "states final_logit_softcapping, which transformers' llama"),
        (lambda w: turn(w, 32), "does not fit its own metadata"),
        (lambda w: (turn(w, 32), w.add_key_length(HEAD)), "rotates 32 of the numbers in a head"),
        (lambda w: (w.add_key_length(64), w.add_value_length(32)), "keys of 64 numbers and values of 32"),
        (
            lambda w: (w.kv_data[0].pop("llama.attention.head_count_kv"), w.add_head_count_kv([2, 2])),
            "states llama.attention.head_count_kv for each layer",
        ),
    ],
)
def test_a_rule_of_the_file_that_would_be_lost_is_refused(says, message, gguf_file):
    path, _ = gguf_file(lambda _: "Q8_0", says=says)
    with pytest.raises(VocabtrimError, match=message):
        load_source(str(path), torch.float32)


def test_a_split_file_is_one_line_with_the_way_to_merge_it(gguf_file):
    path, _ = gguf_file(lambda _: "Q8_0", says=lambda w: w.add_uint16("split.count", 2))
    parts = [path.with_name(f"m-0000{number}-of-00002.gguf") for number in (1, 2)]
    parts[1].write_bytes(path.read_bytes())
    path.rename(parts[0])
    for spec in (parts[0], parts[1], parts[0].parent):
        with pytest.raises(VocabtrimError, match=r"llama-gguf-split --merge .*m-00001-of-00002\.gguf .*m\.gguf"):
            load_source(str(spec), torch.float32)


def test_what_llama_cpp_would_sample_with_is_named(gguf_file):
    def says(writer):
        writer.add_float32("general.sampling.penalty_repeat", 1.5)

    notes = load_source(str(gguf_file(lambda _: "Q8_0", says=says)[0]), torch.float32).notes
    assert any("sample with penalty_repeat=1.5: not applied" in note for note in notes)


def test_settings_that_nothing_reads_are_named(gguf_file):
    def says(writer):
        writer.add_float32("llama.attention.temperature_scale", 0.5)
        writer.add_array("llama.experts_of", [2, 3])
        writer.add_float32("llama.expert_weights_scale", 1.0)  # changes nothing

    notes = load_source(str(gguf_file(lambda _: "Q8_0", says=says)[0]), torch.float32).notes
    (note,) = (each for each in notes if "are not read" in each)
    assert note.endswith("llama.cpp's: llama.attention.temperature_scale=0.5, llama.experts_of=[2 3]")


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (lambda writer: writer.add_string("general.type", "mmproj"), r"holds no model but a part of one \(mmproj\)"),
        (lambda writer: writer.add_causal_attention(False), "bidirectional attention"),
        (lambda writer: writer.add_vocab_size(VOCAB + 1), r"has the shape \[448, 256\], it asks for \[449, 256\]"),
    ],
)
def test_files_that_are_no_decoder_or_lie_are_one_line(says, message, gguf_file):
    with pytest.raises(VocabtrimError, match=message):
        load_source(str(gguf_file(lambda _: "Q8_0", says=says)[0]), torch.float32)


def test_a_big_endian_file_is_named(gguf_file):
    path, _ = gguf_file(lambda _: "Q8_0")
    data = path.read_bytes()
    path.write_bytes(data[:4] + data[4:8][::-1] + data[8:])
    with pytest.raises(VocabtrimError, match="is a big-endian GGUF: convert it"):
        load_source(str(path), torch.float32)
