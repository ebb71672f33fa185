"""examples/eagle3 on a small random target: one step for training and drafting, and what is written and read back."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "eagle3"
sys.path.insert(0, str(EXAMPLE))  # its modules import one another as scripts do

import evaluate  # noqa: E402
import generate  # noqa: E402
import loss  # noqa: E402
import sampling  # noqa: E402
import train  # noqa: E402
from model import Past, head_from_target, load_head  # noqa: E402
from target import Target, rotary, rotate  # noqa: E402
from torch.nn import functional as F  # noqa: E402

GAMMA = 4
LENGTH = 24


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tokenizer):
    """A random Llama of eight layers, grouped keys and norms that are not ones, saved as users have it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("target")
    config = LlamaConfig(
        vocab_size=448,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def target(directory):
    return Target.load(directory, torch.device("cpu"), torch.float32)


@pytest.fixture
def head(target):
    torch.manual_seed(1)
    return head_from_target(target)


def test_target_is_the_model(directory, target):
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 448, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(directory)(ids, output_hidden_states=True)
        features, final = target.forward(ids)
        cache = target.new_cache(3, LENGTH)
        steps = torch.stack([target.decode(ids[:, at], at, cache) for at in range(LENGTH)], 1)
    hidden = torch.cat([wanted.hidden_states[i] for i in (2, 4, 5)], -1)
    torch.testing.assert_close(features, hidden, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(final @ target.unembedding.T, wanted.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(steps, wanted.logits, atol=1e-4, rtol=1e-4)


def sequential_step(head, hidden, embedded):
    """The layer written out for one text: plain causal attention over every row so far; the last row's output.
    hidden, embedded: [rows so far, hidden], true ones first, then the drafter's own."""
    layer, sizes = head.midlayer, head.sizes
    both = torch.cat((layer.input_layernorm(embedded), layer.hidden_norm(hidden)), -1)
    cos, sin = rotary(sizes, len(both), "cpu")
    shape = len(both), -1, sizes.head_dim
    q = rotate(layer.self_attn.q_proj(both).view(shape).transpose(0, 1), cos, sin)
    k = rotate(layer.self_attn.k_proj(both).view(shape).transpose(0, 1), cos, sin)
    v = layer.self_attn.v_proj(both).view(shape).transpose(0, 1)
    mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0, :, -1]
    out = hidden[-1] + layer.self_attn.o_proj(mixed.reshape(-1))
    inner = layer.post_attention_layernorm(out)
    return out + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(inner)) * layer.mlp.up_proj(inner))


def test_unrolled_steps_are_the_sequential_recurrence(target, head):
    ids = torch.randint(0, 448, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        features, _ = target.forward(ids)
        true = head.fc(features[0])
        embedding = target.embedding[ids[0]]
        hidden, past = true[None], Past()
        for step in range(5):
            hidden = head.step(hidden, F.pad(embedding[1 + step :], (0, 0, 0, 1 + step))[None], past)
            for row in (0, 3, LENGTH - 7):
                rows = true[: row + 1]
                for done in range(step + 1):  # the drafter alone from row on, fed the same tokens
                    out = sequential_step(head, rows, embedding[1 : row + 2 + done])
                    rows = torch.cat((rows, out[None]))
                torch.testing.assert_close(hidden[0, row], out, atol=1e-4, rtol=1e-4)


def test_parallel_rounds_are_those_of_a_draft_and_verify_loop(target, head):
    prompts = [[2, 30, 31, 32], [2, 90, 17]]
    answers = evaluate.greedy_answers(target, prompts, 40)
    # a head that is right now and then: it has seen these answers
    optimizer = torch.optim.Adam(head.parameters(), 5e-3)
    for _ in range(12):
        for one in answers:
            ids = one.tokens.long()[None]
            mask = torch.arange(len(one.tokens))[None] >= one.answer
            train.train_step(head, target, optimizer, ids, mask, target.unembedding, 3)
    seen = []
    for prompt, one in zip(prompts, answers, strict=True):
        rounds = evaluate.walk(evaluate.drafts_right(head, target, one, GAMMA), one)
        text, wanted = draft_and_verify(head, target, prompt, 40)
        assert text == one.tokens.tolist()
        assert rounds == wanted
        seen += rounds
    assert len(set(seen)) >= 3  # rejections, acceptances and something between


@torch.no_grad()
def draft_and_verify(head, target, prompt, new_tokens):
    """One token after another, everything computed anew → the text, and the drafts accepted in each round."""

    def choices(text):
        features, final = target.forward(torch.tensor([text]))
        return features[0], (final[0] @ target.unembedding.T).argmax(-1).tolist()

    text = [*prompt, choices(prompt)[1][-1]]
    limit, rounds = len(prompt) + new_tokens, []
    while len(text) < limit and text[-1] not in target.sizes.eos:
        rows = head.fc(choices(text)[0][:-1])  # the last token has not been through the target yet
        drafts = []
        for _ in range(GAMMA):
            tokens = torch.tensor(text[1:] + drafts)
            out = sequential_step(head, rows, target.embedding[tokens])
            rows = torch.cat((rows, out[None]))
            drafts.append(int((head.norm(out) @ target.unembedding.T).argmax()))
        verified = choices(text + drafts)[1][len(text) - 1 :]
        accepted = 0
        while accepted < GAMMA and drafts[accepted] == verified[accepted]:
            accepted += 1
        new = verified[: accepted + 1][: limit - len(text)]
        ends = [i for i, token in enumerate(new) if token in target.sizes.eos]
        new = new[: ends[0] + 1] if ends else new
        text += new
        rounds.append(min(accepted, len(new)))
    return text, rounds


def test_loss_is_cross_entropy_with_soft_labels(target):
    chance = torch.Generator().manual_seed(3)
    final, hidden = torch.randn(2, 7, 32, generator=chance), torch.randn(2, 7, 32, generator=chance)
    mask = torch.ones(2, 7, dtype=torch.bool)
    labels = loss.make_labels(final, mask, target.unembedding)
    assert labels.valid.sum() == 12  # nothing is known after the last token
    given, plain = (hidden[:, :-1].reshape(-1, 32).clone().requires_grad_() for _ in range(2))
    ours, best = loss.CrossEntropy.apply(given, labels.expected[:, :-1].reshape(-1, 32), target.unembedding)
    p = (final[:, :-1].reshape(-1, 32) @ target.unembedding.T).softmax(-1)
    wanted = F.cross_entropy(plain @ target.unembedding.T, p)
    (ours * 3).backward()
    (wanted * 3).backward()
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(given.grad, plain.grad, atol=1e-5, rtol=1e-4)
    assert torch.equal(best, (plain @ target.unembedding.T).argmax(-1))


def test_generate_train_resume_evaluate(directory, target, tmp_path, tokenizer):
    work, output = tmp_path / "work", tmp_path / "head"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"turns": [f"the {w} fox"]}) + "\n" for w in ("quick", "lazy", "brown")))
    common = ["--target", str(directory), "--work", str(work)]
    sizes = ["--batch", "32", "--max-length", "90", "--max-answer", "20", "--prompts", str(prompts)]
    generate.main([*common, *sizes, "--max-tokens", "40"])
    generate.main([*common, *sizes, "--max-tokens", "100"])  # goes on, with another shard
    shards = train.read_shards(work, target.digest)
    assert len(shards) >= 2
    sequences = shards[0].tokens.split(shards[0].lengths.tolist())
    masks = shards[0].mask.bool().split(shards[0].lengths.tolist())
    assert generate.select([], 5, tokenizer, set()) == []  # a batch that the deadline cut before any answer
    before, after = generate.encode(tokenizer, list(generate.opening(tokenizer)))
    for tokens, mask in zip(sequences, masks, strict=True):
        start = int(mask.int().argmax())
        assert tokens[: len(before)].tolist() == before
        assert tokens[start - len(after) : start].tolist() == after
        assert 0 < mask.sum() <= 20
        assert mask[start:].all()

    training = [*common, "--output", str(output), "--batch-tokens", "400", "--log-every", "5", "--draft-steps", "3"]
    training += ["--learning-rate", "1e-2", "--warmup", "5", "--minutes", "5"]
    train.main([*training, "--steps", "30"])
    train.main([*training, "--steps", "40"])
    log = [json.loads(line) for line in (output / train.LOG).read_text().splitlines()]
    assert [entry["step"] for entry in log] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert (
        sum(log[5]["loss"]) < sum(log[0]["loss"]) - 0.3
    )  # a random target is nearly uniform: there is little to learn
    assert log[6]["tokens"] > log[5]["tokens"]
    assert log[6]["seconds"] > log[5]["seconds"]

    report = tmp_path / "tau.json"
    evaluate.main(
        [
            *common[:2],
            "--head",
            str(output),
            "--prompts",
            str(prompts),
            "--output",
            str(report),
            "--max-new-tokens",
            "40",
        ]
    )
    result = json.loads(report.read_text())["sets"]["prompts"]
    assert result["prompts"] == 3
    assert 1 <= result["tau"] <= 5

    (output / "config.json").write_text(
        json.dumps(json.loads((output / "config.json").read_text()) | {"target_digest": ""})
    )
    with pytest.raises(SystemExit, match="another target"):
        load_head(output, target)


def test_a_run_that_was_cut_goes_on_bit_for_bit(directory, target, tmp_path, monkeypatch):
    """20 steps equal 12, an interrupt, and 8 more: weights, moments and the order of the data are all restored."""
    chance = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 400, (40, 30), generator=chance, dtype=torch.int32)
    for name, runs in (("once", [20]), ("twice", [12, 8])):
        work, output = tmp_path / name, tmp_path / f"{name}_head"
        work.mkdir()
        generate.save([sampling.Sequence(row, 9, 0) for row in ids], target.digest, work / "shard_0000.safetensors")
        options = ["--target", str(directory), "--work", str(work), "--output", str(output), "--minutes", "1e9"]
        options += ["--batch-tokens", "200", "--draft-steps", "2", "--steps", "1000000", "--save-minutes", "0"]
        for steps in runs:
            with monkeypatch.context() as patched:
                real, left = train.train_step, iter(range(steps))

                def step(*arguments, real=real, left=left):
                    if next(left, None) is None:
                        raise KeyboardInterrupt
                    return real(*arguments)

                patched.setattr(train, "train_step", step)
                with pytest.raises(KeyboardInterrupt):
                    train.main(options)
    once, twice = (load_file(tmp_path / name / train.STATE) for name in ("once", "twice"))
    assert {name.split(".")[0] for name in once} == {"head", "step", "exp_avg", "exp_avg_sq"}
    for name, tensor in once.items():
        assert torch.equal(tensor, twice[name]), name

    for name, weights in load_head(tmp_path / "once_head", target).state_dict().items():
        assert torch.equal(weights, once[f"head.{name}"].bfloat16().float())
    with safe_open(tmp_path / "once_head" / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in shapes} == {"BF16"}
    assert shapes == {
        "fc.weight": (32, 96),
        "midlayer.input_layernorm.weight": (32,),
        "midlayer.hidden_norm.weight": (32,),
        "midlayer.self_attn.q_proj.weight": (32, 64),
        "midlayer.self_attn.k_proj.weight": (16, 64),
        "midlayer.self_attn.v_proj.weight": (16, 64),
        "midlayer.self_attn.o_proj.weight": (32, 32),
        "midlayer.post_attention_layernorm.weight": (32,),
        "midlayer.mlp.gate_proj.weight": (48, 32),
        "midlayer.mlp.up_proj.weight": (48, 32),
        "midlayer.mlp.down_proj.weight": (32, 48),
        "norm.weight": (32,),
    }
