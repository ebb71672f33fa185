"""Measure how much faster a drafter makes decoding than the target alone.

All ways of decoding are warmed up and then take turns within one run; the figures are medians. Several drafters, draft
lengths or contexts are measured in every combination; --plan says which is fastest on this machine. The exit code is 1
where an output differs from the target's own by more than a near-tie.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from vocabtrim_export.cli.bench_options import (
    PLAN_DRAFT_LENGTHS,
    Bundles,
    add_output_arguments,
    add_random_weight_arguments,
    add_sweep_arguments,
    check_options,
)
from vocabtrim_export.cli.console import progress_reporter
from vocabtrim_export.cli.decoder_arguments import add_device_arguments
from vocabtrim_export.cli.prompt_arguments import (
    add_prompts_argument,
    add_template_arguments,
    chat_options,
    print_skipped,
)
from vocabtrim_export.cli.rule_arguments import add_rule_arguments, rule_options

if TYPE_CHECKING:
    from engines import Engine
    from runtime.measure.bench import ForceAccepted
    from runtime.measure.plan_measurement import PlanReport
    from runtime.measure.report import BenchReport
    from runtime.measure.sweep import SweepReport, SweepSettings
    from vocabtrim_export.calibration import Corpus
    from vocabtrim_export.progress import Progress

EXAMPLE = "--target out/target --drafter out/drafter --prompts prompts.jsonl"
DEFAULT_PROMPTS = 8
RANDOM_PROMPT_TOKENS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    _add_model_arguments(parser)
    _add_prompt_arguments(parser)
    add_sweep_arguments(parser)
    add_rule_arguments(parser)
    add_random_weight_arguments(parser)
    add_output_arguments(parser)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument("--target", type=Path, metavar="DIR", help="the target's bundle")
    group.add_argument(
        "--drafter",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="the trimmed drafter's bundle, or several to compare",
    )
    group.add_argument(
        "--baseline-drafter",
        type=Path,
        metavar="DIR",
        help="the bundle of the same drafter with its full head, to compare with",
    )
    add_device_arguments(group)


def _add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    add_prompts_argument(group)
    add_template_arguments(group)
    group.add_argument(
        "--num-prompts", type=int, metavar="N", help="use the first N prompts (default: 8; with --random-weights 1)"
    )
    group.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="the most tokens to generate")
    group.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each prompt with each drafter")


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 1 where an output differs from the target's own by more than near-ties."""
    from engines import load_engine
    from runtime.measure.plan_measurement import PlanReport
    from runtime.measure.sweep import SweepReport
    from vocabtrim_export.calibration import read_corpus
    from vocabtrim_export.cli.bench_tables import show

    check_options(options)
    corpus = None if options.random_weights else read_corpus(options.prompts)
    with ExitStack() as stack, progress_reporter() as progress:
        bundles = _bundles(options, stack, progress)
        target = stack.enter_context(load_engine(bundles.target, options.device))
        device = getattr(options, "drafter_device", None) or options.device
        drafters = {
            name: stack.enter_context(load_engine(path, device, target)) for name, path in bundles.drafters.items()
        }
        prompts = _encode(options, target, corpus) if corpus else _random_prompts(options, target)
        report = _measure(options, target, drafters, prompts, lambda done, total: progress("bench", done, total))
        if options.profile:
            _profile(options, bundles, target, drafters, prompts[0])
    if isinstance(report, SweepReport) and options.plot:
        _plot(options.plot, report)
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        show(report)
    return 0 if isinstance(report, PlanReport) or report.lossless in (None, True) else 1


def _is_single(options: argparse.Namespace) -> bool:
    """Returns whether nothing is swept: only the trimmed drafter and, if one is given, the full one are compared."""
    lists = options.drafter, options.draft_length, options.context, options.k
    return not options.plan and not options.plot and all(len(values) <= 1 for values in lists)


def _bundles(options: argparse.Namespace, stack: ExitStack, progress: "Progress") -> Bundles:
    if options.random_weights:
        from vocabtrim_export.cli.bench_random import random_bundles

        return random_bundles(options, stack, progress)
    if _is_single(options):
        paths = {"full_drafter": options.baseline_drafter, "trimmed_drafter": options.drafter[0]}
        return Bundles(options.target, {mode: path for mode, path in paths.items() if path})
    several = [*options.drafter, *([options.baseline_drafter] if options.baseline_drafter else [])]
    return Bundles(options.target, {str(path): path for path in several})


def _encode(options: argparse.Namespace, target: "Engine", corpus: "Corpus") -> list[list[int]]:
    from engines.bundle.tokenizer import Tokenizer
    from runtime import SpeculativeDecoder
    from vocabtrim_export.calibration.prompts import prompts_that_fit

    decoder = SpeculativeDecoder(target, tokenizer=Tokenizer.load(options.target))
    most = options.num_prompts or DEFAULT_PROMPTS
    prompts, skipped = prompts_that_fit(decoder, corpus.documents, most, chat_options(options))
    print_skipped([*corpus.skipped, *skipped])
    return prompts


def _random_prompts(options: argparse.Namespace, target: "Engine") -> list[list[int]]:
    import numpy as np

    rng = np.random.default_rng(0)
    tokens = max(options.context, default=min(RANDOM_PROMPT_TOKENS, target.capacity // 2))
    ids = rng.integers(target.manifest.vocab_size, size=(options.num_prompts or 1, tokens))
    prompts: list[list[int]] = ids.tolist()
    return prompts


def _settings(options: argparse.Namespace, target: "Engine") -> "SweepSettings":
    from runtime import SamplingParams
    from runtime.measure.sweep import SweepSettings

    rules = SamplingParams(**rule_options(options))
    rules.check_token_ids(target.manifest.vocab_size)
    lengths = options.draft_length
    if options.plan and not lengths:
        lengths = tuple(length for length in PLAN_DRAFT_LENGTHS if length < target.max_keep)
    forced: ForceAccepted = options.force_accepted
    if options.random_weights and forced is None:
        forced = "all"
    sizes = tuple(lengths), tuple(options.context), options.max_new_tokens, options.repeats
    return SweepSettings(*sizes, forced, rules)


def _measure(
    options: argparse.Namespace,
    target: "Engine",
    drafters: Mapping[str, "Engine"],
    prompts: Sequence[Sequence[int]],
    progress: Callable[[int, int], None],
) -> "BenchReport | PlanReport | SweepReport":
    from runtime.measure.bench import bench
    from runtime.measure.plan_measurement import make_plan
    from runtime.measure.sweep import prompts_at, sweep

    settings = _settings(options, target)
    if options.plan:
        return make_plan(target, drafters, prompts, settings, progress=progress)
    if not _is_single(options):
        return sweep(target, drafters, prompts, settings, progress=progress)
    return bench(
        target,
        drafters,
        prompts_at((target, *drafters.values()), prompts, settings),
        max_new_tokens=settings.max_new_tokens,
        draft_length=settings.draft_lengths[0] if settings.draft_lengths else None,
        repeats=settings.repeats,
        force_accepted=settings.force_accepted,
        sampling=settings.sampling,
        progress=progress,
    )


def _profile(
    options: argparse.Namespace,
    bundles: Bundles,
    target: "Engine",
    drafters: Mapping[str, "Engine"],
    prompt: Sequence[int],
) -> None:
    from runtime.pair import resolve_draft_length
    from vocabtrim_export.cli.bench_profile import write_profile

    drafter = [None, *drafters.values()][-1]
    length = resolve_draft_length(target, drafter, max(options.draft_length, default=None))
    options.profile.mkdir(exist_ok=True)
    write_profile(bundles, prompt, length, options.max_new_tokens, options.profile)


def _plot(path: Path, report: "SweepReport") -> None:
    from vocabtrim_export.cli.sweep_plot import svg

    aside = path.with_name(f".{path.name}.part")
    aside.write_text(svg(report), "utf-8")  # written whole or not at all
    aside.replace(path)
