"""Greedy decoding under the rules of a generation config: the output is that of transformers' `generate`."""

import json
import shutil
from dataclasses import fields

import pytest
import torch
import transformers

from engines import VocabtrimError, load_engine
from engines.generation_rules import GenerationRules
from runtime import SamplingParams, SpeculativeDecoder
from runtime.verification.greedy import verify
from vocabtrim_export.cli.main import main
from vocabtrim_export.generation_rules import _SAMPLING, _UNSUPPORTED, generation_rules, rule_notes
from vocabtrim_export.reference import transformers_reference

PROMPTS = [[5, 17, 200, 33], list(range(40, 70)), [7]]


@pytest.fixture(scope="module")
def plain(random_model):
    """A model and the first token that it gives after each prompt."""
    path = random_model("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        return path, [int(model(torch.tensor([prompt])).logits[0, -1].argmax()) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def directory(plain, tmp_path_factory):
    """The same model with every rule in its generation config."""
    path, first = plain
    path = shutil.copytree(path, tmp_path_factory.mktemp("rules") / "model")
    config = path / "generation_config.json"
    rules = {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[9], [11, 12]],
        "suppress_tokens": [first[0], 6],
        "begin_suppress_tokens": [first[1]],
        "min_new_tokens": 4,
        "typical_p": 0.9,
        "stop_strings": ["never"],
    }
    config.write_text(json.dumps(json.loads(config.read_text()) | rules))
    return path


@pytest.fixture(scope="module")
def result(directory, export_pair):
    return export_pair(directory)


def test_greedy_output_is_that_of_generate(directory, plain, result):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    model.generation_config.stop_strings = None  # it would want a tokenizer for them
    with SpeculativeDecoder.load(result.target, result.drafter, draft_length=4) as decoder:
        for prompt, first in zip(PROMPTS, plain[1], strict=True):
            with torch.no_grad():
                ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)
            found = decoder.generate(prompt, max_new_tokens=40)
            assert list(found.token_ids) == ids[0, len(prompt) :].tolist()
            assert found.stats.accepted > 0
            assert (found.token_ids[0] == first) == (prompt == PROMPTS[2])  # the rules say something
        report = verify(
            decoder, PROMPTS, max_new_tokens=40, predict=transformers_reference(str(directory), decoder.target)
        )
        assert report.passed


def test_parameters_stand_in_place_of_the_config(plain, result):
    """All of them neutral: the model's own output."""
    neutral = SamplingParams(repetition_penalty=1, no_repeat_ngram_size=0, suppress_tokens=(), min_new_tokens=0)
    with SpeculativeDecoder.load(result.target, result.drafter, draft_length=4) as decoder:
        assert decoder.generate(PROMPTS[0], max_new_tokens=1, sampling=neutral).token_ids[0] == plain[1][0]


def test_every_field_of_a_generation_config_is_applied_named_or_without_effect():
    """A later transformers may have others: each has to be sorted into one of the three."""
    applied = {each.name for each in fields(GenerationRules)} - {"unsupported"}
    applied |= {"eos_token_id", *_SAMPLING, "do_sample"}
    limits = {"max_length", "max_new_tokens", "max_time", "num_return_sequences"}
    beams = {"early_stopping", "length_penalty"}  # of num_beams, which is named
    cache = {"use_cache", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size", "is_assistant"}
    speed = {"compile_config", "disable_compile", "continuous_batching_config", "use_mtp", "speculation_type"}
    ids = {"pad_token_id", "bos_token_id", "decoder_start_token_id", "transformers_version"}
    names = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    others = names - applied - set(_UNSUPPORTED) - limits - beams - cache - speed - ids - {"renormalize_logits"}
    prefixes = ("assistant_", "num_assistant_", "prompt_lookup_", "max_matching_", "target_lookbehind", "output_")
    assert not {name for name in others if not name.startswith((*prefixes, "return_dict"))}
    rules = generation_rules(transformers.GenerationConfig(forced_decoder_ids=[[1, 50]]))
    assert rules.unsupported == ("forced_decoder_ids=[[1, 50]]",)


def test_what_is_not_applied_is_named_at_export_and_at_load(result, plain, caplog):
    named = "not applied, although the model's generation config has it: stop_strings=['never'], typical_p=0.9"
    assert named in result.notes
    config = transformers.GenerationConfig(repetition_penalty=1.2, min_new_tokens=3)
    (note,) = rule_notes(config, ("hf", "genai", "openvino"))
    assert note.startswith(
        "--format genai, openvino holds no rules of the generation config (repetition_penalty 1.2, min"
    )
    assert rule_notes(config, ("hf",)) == rule_notes(transformers.GenerationConfig(), ("genai",)) == []
    with caplog.at_level("WARNING", "engines"), load_engine(result.target), load_engine(result.drafter):
        assert [record.getMessage() for record in caplog.records] == [f"{result.target}: {named}"]
    with load_engine(result.target) as engine, pytest.raises(VocabtrimError, match="has other rules than the target's"):
        transformers_reference(str(plain[0]), engine)


def test_the_command_takes_rules_and_gives_logprobs(result, capsys):
    options = [
        "--repetition-penalty",
        "1.5",
        "--presence-penalty",
        "0.5",
        "--frequency-penalty",
        "0.25",
        "--suppress-tokens",
        "6",
    ]
    options += [
        "--logit-bias",
        "7=2.5",
        "8=-1",
        "--no-repeat-ngram-size",
        "2",
        "--min-new-tokens",
        "3",
        "--logprobs",
        "2",
        "--json",
    ]
    bundles = ["--target", str(result.target), "--drafter", str(result.drafter)]
    assert main(["generate", *bundles, "--prompt", "fox", "--raw", "--max-new-tokens", "12", *options]) == 0
    given = json.loads(capsys.readouterr().out)
    sampling = SamplingParams(
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        suppress_tokens=(6,),
        logit_bias={7: 2.5, 8: -1},
        no_repeat_ngram_size=2,
        min_new_tokens=3,
    )
    with SpeculativeDecoder.load(result.target, result.drafter, draft_length=4) as decoder:
        wanted = decoder.generate("fox", max_new_tokens=12, chat=False, sampling=sampling, logprobs=2)
    assert given["token_ids"] == list(wanted.token_ids)
    assert [each["token_id"] for each in given["logprobs"]] == given["token_ids"]
    assert [len(each["top"]) for each in given["logprobs"]] == [2] * len(given["token_ids"])
    sampled = ["--sampling", "--temperature", "0.8", "--min-p", "0.1", "--draws", "90", "--repetition-penalty", "1.2"]
    assert main(["verify", *bundles, "--max-new-tokens", "8", "--num-prompts", "1", *sampled]) == 0
    assert "top-p 1, min-p 0.1: follows the target" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--logit-bias", "7"], "--logit-bias 7: give a token id and a number, such as 42=-5"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0.0: give a number above 0"),
        (["--logprobs", "2"], "--logprobs is part of what --json prints"),
        (["--suppress-tokens", "448"], "suppress_tokens names token 448: the target's ids go from 0 to 447"),
    ],
)
def test_mistakes_in_rules_are_one_line(options, message, result, capsys):
    assert main(["generate", "--target", str(result.target), "--prompt", "fox", *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "wrong",
    [{"repetition_penalty": "much"}, {"bad_words_ids": [5]}, {"suppress_tokens": 5}, {"repetition_penalty": -1.0}],
)
def test_a_rule_that_cannot_be_read_is_one_line(wrong):
    config = transformers.GenerationConfig()
    for name, value in wrong.items():
        setattr(config, name, value)
    with pytest.raises(VocabtrimError) as caught:
        generation_rules(config)
    assert "\n" not in str(caught.value)
