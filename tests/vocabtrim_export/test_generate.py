"""Batched sampling: what a row yields is what the model says of that prompt alone."""

import numpy as np
import pytest

from engines.errors import VocabtrimError
from vocabtrim_export.calibration import BatchLimits, Corpus, CountSettings, Document, Message, calibrate
from vocabtrim_export.calibration.prompts import encode_document
from vocabtrim_export.sources.runtime_tokenizer import runtime_tokenizer

torch = pytest.importorskip("torch")

PROMPTS = ([5, 9, 11], [300], list(range(20, 45)), [7, 7, 8, 200, 31], [44, 45], [90, 12, 13])
STEPS = 24


def generate(model, prompts, *, uniforms=None, temperature=0.0, eos=frozenset()):
    from vocabtrim_export.calibration.generate import generate_batch

    uniforms = np.zeros((len(prompts), STEPS)) if uniforms is None else uniforms
    return generate_batch(model, prompts, uniforms, temperature=temperature, eos_token_ids=eos)


def reference(model, prompt, eos):
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=STEPS,
        eos_token_id=sorted(eos) or None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def sliding_model(model):
    """Gemma 3, of the same size: windows of four tokens, embedding scale, q/k norms."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(1)
    config = Gemma3TextConfig(
        vocab_size=model.config.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.4,
        tie_word_embeddings=False,  # tied, random weights repeat their input for ever
    )
    return Gemma3ForCausalLM(config).eval()


def absolute_model(model):
    """GPT-2, of the same size: learned positions, which padding must not shift (rotary ones would not notice)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    size = {"vocab_size": model.config.vocab_size, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.4, tie_word_embeddings=False)).eval()


@pytest.mark.parametrize("make", [lambda model: model, sliding_model, absolute_model], ids=["llama", "gemma3", "gpt2"])
def test_greedy_batches_equal_generate_row_by_row(model, make):
    model = make(model)
    free = generate(model, PROMPTS)
    # Tokens that the first rows reach after a few steps: rows then end at different steps and the batch is compacted.
    eos = frozenset({int(free[0, 3]), int(free[1, 9]), int(free[2, 5])})
    rows = generate(model, PROMPTS, eos=eos)
    expected = [reference(model, prompt, eos) for prompt in PROMPTS]
    assert [[token for token in row if token >= 0] for row in rows.tolist()] == expected
    assert len({len(row) for row in expected}) > 2


def test_a_row_does_not_depend_on_the_batch_it_runs_in(model):
    uniforms = np.random.default_rng(0).random((len(PROMPTS), STEPS))
    free = generate(model, PROMPTS, uniforms=uniforms, temperature=0.8)
    eos = frozenset(free[[0, 1, 2], [3, 9, 5]].tolist())  # rows end at different steps and the batch is compacted
    together = generate(model, PROMPTS, uniforms=uniforms, temperature=0.8, eos=eos)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], uniforms=uniforms[[row]], temperature=0.8, eos=eos)
        assert alone[0].tolist() == together[row].tolist()


@pytest.mark.statistical
def test_samples_follow_the_softmax():
    from vocabtrim_export.calibration.generate import sample

    logits = torch.randn(1300, generator=torch.Generator().manual_seed(0))  # three blocks, the last one padded
    logits[[0, 600, 1299]] += 6
    logits[5] = -torch.inf
    draws = 50_000
    uniforms = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws  # evenly spread: no sampling noise
    expected = torch.softmax(logits.double() / 0.7, -1) * draws
    found = torch.cat([sample(logits.expand(1000, -1), part, 0.7) for part in uniforms.split(1000)])
    assert (torch.bincount(found, minlength=1300) - expected).abs().max() < 1.1
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert sample(logits[None], last, 0.7).item() == 1299
    with pytest.raises(VocabtrimError, match="not finite"):
        sample(torch.tensor([[0.0, torch.nan]]), last, 1.0)


def test_only_generated_tokens_count_and_the_eos_does(model, tokenizer):
    """The oracle: calibrating at temperature 0 counts what `generate` yields after each truncated chat prompt."""
    chats = [Document("", (Message("user", f"the {word}"),)) for word in ("dog", "fox", "quick brown system of tokens")]
    corpus = Corpus.of(chats, "test")
    limits = BatchLimits(batch_size=2, max_prompt_tokens=6, max_new_tokens=STEPS)
    settings = CountSettings("drafter", max_tokens=10**6, temperature=0, limits=limits)
    found = calibrate(model, tokenizer, corpus, settings)
    prompts = [
        tokenizer.apply_chat_template(  # the tokenizer's own way from messages to ids
            [{"role": "user", "content": chat.prompt[0].content}], add_generation_prompt=True, return_dict=False
        )[-6:]
        for chat in chats
    ]
    expected = [np.bincount(reference(model, ids, {tokenizer.eos_token_id}), minlength=448) for ids in prompts]
    assert found.counts.tolist() == (expected[0] + expected[1]).tolist()
    assert found.held_out.tolist() == expected[2].tolist()


def test_prompts_follow_the_template_and_text_does_not(tokenizer):
    chat, raw = Document("", (Message("system", "of"), Message("user", "fox"))), Document("fox")
    ids = [encode_document(runtime_tokenizer(tokenizer), document) for document in (chat, raw)]
    assert tokenizer.decode(ids[0]) == "<|system|>\nof<|end|>\n<|user|>\nfox<|end|>\n<|assistant|>\n"
    assert tokenizer.decode(ids[1]) == "<|bos|>fox"


def test_a_template_without_a_system_role_gets_its_text(tokenizer, monkeypatch):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", strict)
    chat = Document("", (Message("system", "of"), Message("user", "fox")))
    assert tokenizer.decode(encode_document(runtime_tokenizer(tokenizer), chat)) == "[of\n\nfox]"
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('never') }}")
    with pytest.raises(VocabtrimError, match="chat template refused the messages: never"):
        encode_document(runtime_tokenizer(tokenizer), chat)


def test_the_head_reads_the_last_positions_without_gaps(model):
    """PyTorch multiplies a view of them row by row, and in bfloat16 copies the head for each row of the batch."""
    read = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _head, inputs, _output: read.append((tuple(inputs[0].shape), inputs[0].is_contiguous()))
    )
    try:
        generate(model, [list(range(5, 45)), list(range(60, 98))])
    finally:
        handle.remove()
    assert read[0][0][:2] == (2, 1)
    assert all(is_contiguous for _, is_contiguous in read)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_the_reading_of_prompts_is_reported(model, tokenizer, monkeypatch):
    """It takes minutes for a large model, in which a calibration would seem to stand still."""
    from vocabtrim_export.calibration import generate as generating
    from vocabtrim_export.calibration.count_settings import CountEvents

    monkeypatch.setattr(generating, "_PREFILL_TOKENS", 8)
    corpus = Corpus.of([Document("the quick brown fox " * 2), Document("jumps over the lazy dog")], "test")
    events: list[tuple[str, int, int]] = []
    calibrate(
        model,
        tokenizer,
        corpus,
        CountSettings("target", max_tokens=4),
        events=CountEvents(
            progress=lambda done, total: events.append(("tokens", done, total)),
            on_prompts=lambda read, total: events.append(("prompts", read, total)),
        ),
    )
    reads = [(read, total) for name, read, total in events if name == "prompts"]
    whole = sum(len(encode_document(runtime_tokenizer(tokenizer), each)) for each in corpus.documents)
    assert len(reads) > 1
    assert reads[-1] == (whole, whole)
    assert [read for read, _ in reads] == sorted({read for read, _ in reads})
    assert all(done == 0 for name, done, _ in events[: len(reads)] if name == "tokens")
