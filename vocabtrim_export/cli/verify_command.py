"""Check that the output with a drafter is the target's own.

Every token of a greedy generation is compared with the most likely token of a reference model after the same text, and
with the token that the target alone chooses there. With --sampling the distribution of sampled tokens is tested too.
The exit code is 1 where a difference is larger than rounding explains.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from engines.errors import VocabtrimError
from vocabtrim_export.cli.arguments import add_json_argument
from vocabtrim_export.cli.combinations import refuse_stated
from vocabtrim_export.cli.console import progress_reporter
from vocabtrim_export.cli.decoder_arguments import add_decoder_arguments, load_decoder
from vocabtrim_export.cli.prompt_arguments import (
    add_prompts_argument,
    add_template_arguments,
    chat_options,
    print_skipped,
    template_args,
)
from vocabtrim_export.cli.rule_arguments import add_rule_arguments, rule_options

if TYPE_CHECKING:
    from runtime import SamplingParams, SpeculativeDecoder
    from runtime.verification.differences import Difference
    from runtime.verification.greedy import VerifyReport
    from runtime.verification.sampled import SamplingReport

EXAMPLE = "--target out/target --drafter out/drafter --prompts prompts.jsonl --sampling"
PROMPTS = (
    "Write a haiku about memory bandwidth.",
    "What is 17 times 23? Explain each step.",
    "Write a Python function that reverses the words of a sentence.",
    "Name three rivers in Europe and say where they end.",
)
_SETTING = ("temperature", "top_k", "top_p", "min_p")
_DRAWS = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_decoder_arguments(parser, needs_drafter=True)
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="the reference model, which transformers runs in float32: a hub id, a local directory or a .gguf file "
        "(default: the target's own bundle)",
    )
    add_prompts_argument(parser)
    add_template_arguments(parser)
    parser.add_argument("--num-prompts", type=int, default=8, metavar="N", help="use the first N prompts")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="the most tokens to generate for a prompt"
    )
    _add_sampling_test_arguments(parser)
    add_rule_arguments(parser)
    add_json_argument(parser)


def _add_sampling_test_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--sampling", action="store_true", help="test the distribution of sampled tokens too")
    group.add_argument(
        "--temperature",
        type=float,
        help="with this or the next three, test these settings instead of several preset ones",
    )
    group.add_argument("--top-k", type=int, help="top-k of that test")
    group.add_argument("--top-p", type=float, help="top-p of that test")
    group.add_argument("--min-p", type=float, help="min-p of that test")
    group.add_argument("--draws", type=int, metavar="N", help="sampled tokens to test in each setting (default: 2000)")
    group.add_argument("--seed", type=int, help="seed of the first generation; each later one adds 1 (default: 0)")


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 1 for a difference that rounding does not explain."""
    from runtime import SamplingParams
    from runtime.verification.sampled import check_test, verify_sampling

    settings, rules = _settings(options), SamplingParams(**rule_options(options))
    draws = _DRAWS if options.draws is None else options.draws
    check_test(settings, draws)
    for name in ("num_prompts", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise VocabtrimError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give 1 or more")
    with (
        load_decoder(options) as decoder,
        progress_reporter() as progress,
    ):
        prompts = _prompts(options, decoder)
        greedy = _verify(options, decoder, prompts, rules, progress)
        sampled = None
        if settings:
            sampled = verify_sampling(
                decoder,
                prompts,
                settings,
                draws=draws,
                progress=lambda *done: progress("sampling", *done),
            )
    passed = greedy.passed and (sampled is None or sampled.passed)
    if options.json:
        print(json.dumps(_data(greedy, sampled, decoder) | {"passed": passed}, indent=2, ensure_ascii=False))
    else:
        _show(greedy, sampled, decoder)
        print("lossless" if passed else "NOT LOSSLESS")
    return 0 if passed else 1


def _settings(options: argparse.Namespace) -> "Sequence[SamplingParams]":
    """Returns the sampling settings to test; none without --sampling."""
    from dataclasses import replace

    from engines.sampling_params import SamplingParams
    from runtime.verification.sampled import SETTINGS

    if not options.sampling:
        unset = dict.fromkeys((*_SETTING, "draws", "seed"))
        refuse_stated(options, unset, "is for a test of sampling: give --sampling as well")
        return ()
    seed = options.seed or 0
    own = {name: getattr(options, name) for name in _SETTING if getattr(options, name) is not None}
    if own:
        settings: dict[str, Any] = {"temperature": 1.0, "seed": seed, **own, **rule_options(options)}
        return (SamplingParams(**settings),)
    return [replace(params, seed=seed, **rule_options(options)) for params in SETTINGS]


def _prompts(options: argparse.Namespace, decoder: "SpeculativeDecoder") -> list[list[int]]:
    if not options.prompts:
        asked = {"template_args": template_args(options), "chat_template": options.chat_template}
        return [decoder.encode(prompt, **asked) for prompt in PROMPTS[: options.num_prompts]]
    from vocabtrim_export.calibration import read_corpus
    from vocabtrim_export.calibration.prompts import prompts_that_fit

    corpus = read_corpus(options.prompts)
    prompts, skipped = prompts_that_fit(decoder, corpus.documents, options.num_prompts, chat_options(options))
    print_skipped([*corpus.skipped, *skipped])
    return prompts


def _verify(
    options: argparse.Namespace,
    decoder: "SpeculativeDecoder",
    prompts: Sequence[Sequence[int]],
    rules: "SamplingParams",
    progress: Callable[[str, int, int], None],
) -> "VerifyReport":
    from runtime.verification.greedy import verify

    judge: dict[str, Any] = {}
    if options.reference:
        from vocabtrim_export.reference import transformers_reference

        predict = transformers_reference(options.reference, decoder.target)
        judge = {"predict": predict, "reference": f"{options.reference} in transformers, float32"}
    return verify(
        decoder,
        prompts,
        max_new_tokens=options.max_new_tokens,
        sampling=rules,
        progress=lambda *done: progress("verify", *done),
        **judge,
    )


def _data(greedy: "VerifyReport", sampled: "SamplingReport | None", decoder: "SpeculativeDecoder") -> dict[str, Any]:
    """Returns both reports, with the texts of the tokens that differ."""
    judged = greedy.to_dict()
    for prompt in judged["prompts"]:
        for each in (*prompt["differences"], *prompt["target_only"]):
            each |= {f"{name}_text": _text(decoder, each[name]) for name in ("found", "expected")}
    return {"greedy": judged, "sampling": sampled.to_dict() if sampled else None}


def _show(greedy: "VerifyReport", sampled: "SamplingReport | None", decoder: "SpeculativeDecoder") -> None:
    length = f"up to {greedy.draft_length}" if decoder.length.adapts else greedy.draft_length
    print(f"greedy, γ = {length}, against {greedy.reference}")
    for index, prompt in enumerate(greedy.prompts):
        deviation = "" if prompt.deviation is None else f", logits within {prompt.deviation:.0f} roundings"
        print(f"  prompt {index}: {prompt.verdict}, {prompt.tokens} tokens{deviation}")
        if prompt.ending:
            print(f"    {prompt.ending}")
        if not prompt.is_one_model:
            print(
                f"    the target's logits after one token at a time and after several at once differ by "
                f"{prompt.step_deviation:.0f} roundings, where {prompt.step_limit:.0f} are explained by rounding: "
                "its choice depends on how many tokens it verifies"
            )
        for by, differences in (("", prompt.differences), ("target alone, one token at a time: ", prompt.target_only)):
            for each in differences:
                _show_difference(by, each, decoder)
    if not greedy.is_independent:
        print(
            "compared only with the target's own engine, which shows what speculation changes and not whether "
            "the target computes what its model does: give --reference MODEL for that"
        )
    for setting in sampled.settings if sampled else ():
        print(
            f"sampled, temperature {setting.temperature:g}, top-k {setting.top_k}, top-p {setting.top_p:g}, "
            f"min-p {setting.min_p:g}: "
            f"{'follows the target' if setting.passed else 'DIFFERS'}, p-value {setting.p_value:.2g} "
            f"(fails below {setting.limit:.2g}), {setting.impossible} impossible tokens\n"
            f"  {setting.draws} draws find a total variation of {setting.detectable:.3f} with a probability of 99%; "
            f"the drafter lacks {setting.missed_mass:.1%} of the target's mass"
        )


def _show_difference(by: str, each: "Difference", decoder: "SpeculativeDecoder") -> None:
    chosen, expected = (f"{token} {_text(decoder, token)!r}" for token in (each.found, each.expected))
    print(
        f"    {by}{each.verdict} at token {each.position}: {chosen} instead of {expected}, "
        f"gap {each.gap:.3g}, rounding explains {each.tolerance:.3g}"
    )


def _text(decoder: "SpeculativeDecoder", token: int) -> str:
    return decoder.tokenizer.backend.decode([token], skip_special_tokens=False) if decoder.tokenizer else ""
