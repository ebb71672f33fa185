"""The options of `vocabtrim bench` that sweep and plan, and the checks of their combinations."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import VocabtrimError
from vocabtrim_export.cli.arguments import add_json_argument
from vocabtrim_export.cli.combinations import refuse_stated

if TYPE_CHECKING:
    from runtime.measure.bench import ForceAccepted

PLAN_DRAFT_LENGTHS = (1, 2, 3, 4, 6, 8)
RANDOM_SHAPES = ("llama-3.2-1b", "llama-3.1-8b", "qwen2.5-0.5b", "smollm2-135m", "tiny")
RANDOM_HEADS = ("eagle3-llama-3.1-8b", "eagle3-llama-3.2-1b", "eagle3-tiny")
_RANDOM_OPTIONS = ("random_drafter", "k", "dtype", "quantize", "quantize_drafter", "max_length", "bundles")


@dataclass(frozen=True, slots=True)
class Bundles:
    """The bundles that a bench runs.

    Attributes:
        target: The target's bundle.
        drafters: The drafters' bundles by the names that reports give them.
    """

    target: Path
    drafters: Mapping[str, Path]


def numbers(text: str) -> tuple[int, ...]:
    """Parse positive numbers, such as "1,2,4". Returns them ascending, each once."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers from 1 up, separated by commas, such as 1,2,4")
    return tuple(sorted(set(values)))


def force_accepted(text: str) -> "ForceAccepted":
    """Parse a number from 0 up, or "all"."""
    if text == "all":
        return "all"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: give a number from 0 up, or all")
    return int(text)


def head_rows(text: str) -> tuple[int | None, ...]:
    """Parse numbers of rows, such as "8192,full". Returns None for "full"."""
    parts = text.split(",")
    if not all(part == "full" or (part.isdecimal() and int(part) > 0) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of rows or full, such as 8192,32768,full")
    return tuple(dict.fromkeys(None if part == "full" else int(part) for part in parts))


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is measured. Several values of one make a sweep."""
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--draft-length",
        type=numbers,
        default=[],
        metavar="N[,N…]",
        help="tokens drafted per round (γ). Default: on the CPU up to 16, as many as save time; 4 on a GPU, in a "
        f"sweep and with --force-accepted; with --plan {','.join(map(str, PLAN_DRAFT_LENGTHS))}",
    )
    group.add_argument(
        "--context",
        type=numbers,
        default=[],
        metavar="N[,N…]",
        help="cut or repeat each prompt to N tokens, to measure step times at that context length",
    )
    group.add_argument(
        "--force-accepted",
        type=force_accepted,
        metavar="N",
        help="accept N tokens of each draft (or all) without asking the target: this measures latency apart from the "
        "drafter's quality; the generated text is meaningless",
    )
    group.add_argument(
        "--plan", action="store_true", help="say which drafter and draft length are fastest here, and what limits them"
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is written and printed."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="write to DIR how long rounds and operators take in one more generation, as traces for ui.perfetto.dev "
        "(CPU only)",
    )
    group.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the results of the sweep")
    add_json_argument(group)


def add_random_weight_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of bundles with random weights."""
    group = parser.add_argument_group("with --random-weights")
    group.add_argument(
        "--random-weights",
        choices=RANDOM_SHAPES,
        metavar="NAME",
        help="instead of --target and --drafter, measure bundles of this model's shape that are made now with random "
        f"weights, on prompts of random tokens: {', '.join(RANDOM_SHAPES)}. --force-accepted is then all by default",
    )
    group.add_argument(
        "--random-drafter",
        choices=RANDOM_SHAPES + RANDOM_HEADS,
        metavar="NAME",
        help="the drafter's shape (default: the target's): one of those, or an EAGLE-3 head for it: "
        f"{', '.join(RANDOM_HEADS)}",
    )
    group.add_argument("--k", type=head_rows, default=[], metavar="K[,K…]", help="rows of the drafter's head, or full")
    group.add_argument(
        "--dtype", choices=["fp32", "fp16", "bf16"], help="dtype of weights and KV cache (default: fp32)"
    )
    quantizations = ["none", "int8", "int4"]
    group.add_argument("--quantize", choices=quantizations, help="quantise the weights (default: none)")
    group.add_argument(
        "--quantize-drafter",
        choices=quantizations,
        help="quantise the drafter's weights in another way than --quantize",
    )
    group.add_argument("--max-length", type=int, metavar="N", help="tokens that the KV caches hold (default: 1024)")
    group.add_argument("--bundles", type=Path, metavar="DIR", help="keep the bundles in DIR for later runs")


def check_options(options: argparse.Namespace) -> None:
    """Check the options of `vocabtrim bench`.

    Raises:
        VocabtrimError: An option is out of range, missing, or contradicts another.
    """
    for name in ("max_new_tokens", "repeats"):
        _at_least_one(name, getattr(options, name))
    if options.num_prompts is not None:
        _at_least_one("num_prompts", options.num_prompts)
    if options.plot and not options.plot.absolute().parent.is_dir():
        raise VocabtrimError(f"--plot {options.plot}: there is no directory {options.plot.absolute().parent}")
    if options.profile:
        _check_profile(options)
    if options.random_weights:
        if options.target or options.drafter or options.baseline_drafter or options.prompts:
            raise VocabtrimError("--random-weights makes its own bundles and prompts: leave out those given")
        unset: dict[str, Any] = {"template_arg": [], "chat_template": None}
        refuse_stated(options, unset, "is for prompts of text, and --random-weights makes tokens: leave it out")
        if options.dtype == "bf16" and options.device == "cpu":
            raise VocabtrimError("ONNX Runtime has no bf16 on the CPU: use --dtype fp32, or --device cuda")
        if options.plan:
            raise VocabtrimError("random weights have no acceptance to plan with: give --plan real bundles")
        return
    if given := [name for name in _RANDOM_OPTIONS if getattr(options, name)]:
        raise VocabtrimError(f"--{given[0].replace('_', '-')} is for --random-weights: bundles have theirs already")
    if missing := [name for name in ("target", "drafter", "prompts") if not getattr(options, name)]:
        raise VocabtrimError(f"--{missing[0]} is missing: give the bundles and prompts, or --random-weights NAME")
    if options.plan and (options.plot or options.force_accepted is not None or len(options.context) > 1):
        raise VocabtrimError("--plan takes one --context at most, and neither --plot nor --force-accepted")


def _check_profile(options: argparse.Namespace) -> None:
    if options.device != "cpu" or options.drafter_device not in (None, "cpu"):
        raise VocabtrimError("--profile is for the CPU; for a GPU, docs/profiling.md has the nsys lines")
    if options.profile.exists() and not options.profile.is_dir():
        raise VocabtrimError(f"--profile {options.profile}: that is a file, give a directory")
    if not options.profile.absolute().parent.is_dir():
        raise VocabtrimError(f"--profile {options.profile}: there is no directory {options.profile.absolute().parent}")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise VocabtrimError(f"--{name.replace('_', '-')} is {value}: give 1 or more")
