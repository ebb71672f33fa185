"""In-context slots: a trimmed drafter that can propose what its head lacks, where the text has had it."""

import json
import shutil

import numpy as np
import pytest

from engines import load_engine
from engines.bundle.read import HEAD_ROWS_NAME, MANIFEST_NAME, Manifest, check_bundle, read_bundle
from engines.errors import VocabtrimError
from runtime import SamplingParams, SpeculativeDecoder
from tests.integration.test_mistakes import assert_one_line
from vocabtrim_export.cli.main import export_main, main

K, VOCAB = 64, 448
PROMPTS = [[5, 17, 200, 33], list(range(40, 70)), [7]]


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("llama")


@pytest.fixture(scope="module")
def pair(model, export_pair):
    """Sixteen slots, so that tokens leave them."""
    return export_pair(model, k=K, slots=16)


def over_tokens(engine, logits):
    """[n, vocab] of logits, -inf for what the engine cannot propose."""
    if engine.head_tokens is None:
        return logits.copy()
    tokens = engine.head_tokens.kept_token_ids
    spread = np.full((len(logits), VOCAB), -np.inf, np.float32)
    spread[:, tokens[tokens >= 0]] = logits[:, tokens >= 0]
    return spread


@pytest.mark.parametrize(
    ("architecture", "options", "tolerance"),
    [
        ("llama", {}, 1e-5),
        ("llama", {"quantize": "int8"}, 0.04),  # the head's own product rounds its input to 8 bits, the slots' does not
        ("llama", {"quantize": "int4"}, 0.04),
        ("llama", {"dtype": "fp16"}, 2e-3),
        ("gemma2", {}, 1e-5),  # caps its logits
        ("granite", {}, 1e-5),  # scales them
        ("phi", {}, 1e-5),  # has a bias
    ],
)
def test_with_every_token_in_slots_the_trimmed_head_is_the_full_one(
    random_model, export_pair, architecture, options, tolerance
):
    directory = random_model(architecture)
    slotted = export_pair(directory, k=K, slots=10_000, **options)  # as many as there are to fill
    full = export_pair(directory, k=VOCAB, **options)
    assert full.drafter_manifest.slots == 0
    with load_engine(slotted.drafter) as trimmed, load_engine(full.drafter) as whole:
        assert trimmed.manifest.slots == len(slotted.selection.lost_token_ids)
        prompt = list(range(30, 60))
        wanted = whole.feed(prompt, keep=8)
        trimmed.remember(range(VOCAB))
        found = trimmed.feed(prompt, keep=8)
        proposable = np.sort(trimmed.head_tokens.kept_token_ids)
        logits = wanted.logits[:, proposable]
        np.testing.assert_allclose(
            over_tokens(trimmed, found.logits)[:, proposable], logits, atol=tolerance * wanted.logits.std(), rtol=1e-5
        )
        if not options:
            assert found.token_ids.tolist() == proposable[logits.argmax(-1)].tolist()


def test_empty_slots_are_the_plain_trimmed_head(model, pair, export_pair):
    plain = export_pair(model, k=K)
    with load_engine(pair.drafter) as slotted, load_engine(plain.drafter) as trimmed:
        for tokens in PROMPTS:
            slotted.rewind(0)
            trimmed.rewind(0)
            found, wanted = slotted.feed(tokens), trimmed.feed(tokens)
            np.testing.assert_array_equal(found.logits[:, :K], wanted.logits)
            assert np.isneginf(found.logits[:, K:]).all()
            assert found.token_ids.tolist() == wanted.token_ids.tolist()


def test_slots_hold_the_latest_tokens_of_the_text_that_the_head_lacks(pair):
    lost = pair.selection.lost_token_ids.tolist()
    kept = set(pair.selection.vocab_map.kept_token_ids.tolist())
    with SpeculativeDecoder.load(pair.target, pair.drafter, draft_length=4) as decoder:
        drafter = decoder.drafter

        def inside():
            return {token for token in drafter.head_tokens.kept_token_ids[K:].tolist() if token >= 0}

        for prompt in (lost[:40], lost[100:140], [5, *lost[:3]]):
            result = decoder.generate(prompt, max_new_tokens=30)
            seen = [*prompt, *result.token_ids]
            held = [token for token in seen[: drafter.length] if token not in kept]
            assert set(list(dict.fromkeys(reversed(held)))[:12]) <= inside()  # a last round may have drafted nothing
            assert inside() <= set(seen) - kept
        drafter.rewind(0)
        assert not inside()


def test_output_is_the_targets_and_drafts_are_better(pair, model, export_pair):
    plain = export_pair(model, k=K)
    accepted = {}
    for name, result in (("slots", pair), ("none", plain)):
        with (
            SpeculativeDecoder.load(result.target) as alone,
            SpeculativeDecoder.load(result.target, result.drafter, draft_length=4) as decoder,
        ):
            found = [decoder.generate(prompt, max_new_tokens=80) for prompt in PROMPTS]
            wanted = [alone.generate(prompt, max_new_tokens=80).token_ids for prompt in PROMPTS]
            assert [each.token_ids for each in found] == wanted
            accepted[name] = sum(each.stats.accepted for each in found)
            sampling = SamplingParams(temperature=1.0, seed=4)
            first, again = (decoder.generate(PROMPTS[0], max_new_tokens=40, sampling=sampling) for _ in range(2))
            assert first.token_ids == again.token_ids  # nothing of another text is left in the slots
    assert accepted["slots"] > accepted["none"]


def test_forks_have_slots_of_their_own(pair):
    lost = pair.selection.lost_token_ids
    with load_engine(pair.drafter) as one, one.fork() as other:
        for engine, tokens in ((one, lost[:5]), (other, lost[5:9])):
            engine.remember(tokens.tolist())
            engine.feed(PROMPTS[0])
        logits = [engine.feed([3]).logits.copy() for engine in (one, other)]
        for engine, tokens in ((one, lost[:5]), (other, lost[5:9])):
            columns = engine.head_tokens.inverse[tokens]
            assert (columns >= K).all()
        assert np.isfinite(logits[0][0, K:]).sum() == 5
        assert np.isfinite(logits[1][0, K:]).sum() == 4


def test_a_bundle_with_slots_passes_verify_and_bench(pair, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "a text of a few words"}) + "\n")
    bundles = ["--target", str(pair.target), "--drafter", str(pair.drafter), "--prompts", str(prompts)]
    assert main(["verify", *bundles, "--max-new-tokens", "12", "--sampling", "--draws", "200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(["bench", *bundles, "--max-new-tokens", "12", "--repeats", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_mistakes_of_an_export(model, count_file, tmp_path, capsys):
    def attempt(*options):
        common = ["--drafter", model, "--target", model, "--output", tmp_path / "out", "--calibration"]
        arguments = [*common, count_file(model), "--max-length", 64, *options]
        return export_main([str(each) for each in arguments]), capsys.readouterr().err

    assert_one_line(attempt("--k", K, "--slots", -1), "--slots is -1.*0 for none")
    assert_one_line(attempt("--k", VOCAB, "--slots", 8), "keeps all of them.*smaller K")
    assert_one_line(attempt("--k", K, "--slots", 8, "--format", "onnx", "triton"), "triton cannot hold --slots")
    assert not (tmp_path / "out").exists()


def test_mistakes_of_a_bundle(pair, tmp_path):
    missing, changed, older = (shutil.copytree(pair.drafter, tmp_path / name) for name in ("missing", "changed", "old"))
    (missing / HEAD_ROWS_NAME).unlink()
    data = bytearray((changed / HEAD_ROWS_NAME).read_bytes())
    data[-5] ^= 1
    (changed / HEAD_ROWS_NAME).write_bytes(data)
    messages = {missing: f"lacks {HEAD_ROWS_NAME}", changed: f"{HEAD_ROWS_NAME} does not match its digest"}
    for path, message in messages.items():
        with pytest.raises(VocabtrimError, match=message):
            load_engine(path)
    assert all(check.wrong is None for check in check_bundle(pair.drafter))
    manifest = json.loads((older / MANIFEST_NAME).read_text())
    assert manifest["slots"] == 16
    assert len({path.stat().st_mode for path in pair.drafter.iterdir()}) == 1  # whoever reads one file reads all
    text = read_bundle(pair.target).manifest.to_json()
    assert Manifest.from_json(text, "here").slots == 0
