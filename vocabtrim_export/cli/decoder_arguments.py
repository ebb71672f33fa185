"""Options of the commands that generate text: which bundles, and how tokens are chosen."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vocabtrim_export.cli.combinations import check_drafter_options, check_sampling_options
from vocabtrim_export.cli.rule_arguments import add_rule_arguments, rule_options

if TYPE_CHECKING:
    from runtime import SamplingParams, SpeculativeDecoder
    from runtime.pair import Auto


def add_decoder_arguments(parser: argparse.ArgumentParser, needs_drafter: bool = False) -> None:
    """Add the options that `load_decoder` reads.

    Args:
        parser: The command's parser.
        needs_drafter: Whether the command cannot do without a drafter.
    """
    group = parser.add_argument_group("models")
    group.add_argument("--target", type=Path, required=True, metavar="DIR", help="the target's bundle")
    alone = "" if needs_drafter else " (default: the target alone)"
    group.add_argument(
        "--drafter", type=Path, required=needs_drafter, metavar="DIR", help=f"the drafter's bundle{alone}"
    )
    add_device_arguments(group)
    group.add_argument(
        "--draft-length",
        type=draft_length,
        metavar="N",
        help="tokens drafted per round (γ); auto, the default with a drafter: as many as save time on this text and "
        "machine, up to 16 on the CPU, 1, 3 or 7 on a GPU; auto without a drafter: prompt lookup alone",
    )
    group.add_argument(
        "--no-prompt-lookup",
        action="store_false",
        dest="prompt_lookup",
        help="with --draft-length auto: do not draft text that repeats an earlier part of the prompt or the output",
    )


def add_device_arguments(group: argparse._ArgumentGroup) -> None:
    """Add `--device` and `--drafter-device`."""
    group.add_argument("--device", default="cpu", help="where the models run: cpu or cuda")
    group.add_argument("--drafter-device", metavar="DEVICE", help="where the drafter runs (default: as --device)")


def draft_length(text: str) -> "int | Auto":
    """Parse `--draft-length`: a number, or "auto"."""
    return "auto" if text == "auto" else int(text)


def load_decoder(options: argparse.Namespace) -> "SpeculativeDecoder":
    """Load the bundles that the options of `add_decoder_arguments` name.

    Raises:
        VocabtrimError: A bundle is damaged, the two do not belong together, or an option is for a drafter
            that is not there.
    """
    from runtime import SpeculativeDecoder

    check_drafter_options(options)
    return SpeculativeDecoder.load(
        options.target,
        options.drafter,
        device=options.device,
        draft_length=options.draft_length,
        drafter_device=options.drafter_device,
        prompt_lookup=options.prompt_lookup,
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `sampling_params` reads."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0: greedy, always the most likely token"
    )
    group.add_argument("--top-k", type=int, default=0, help="sample from the k most likely tokens; 0: from all")
    group.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the most likely tokens whose probabilities reach this sum"
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="sample from the tokens that have at least this share of the most likely token's probability",
    )
    group.add_argument("--seed", type=int, help="seed of the sampling (default: another one each time)")
    add_rule_arguments(parser)


def add_stop_argument(group: argparse._ActionsContainer) -> None:
    """Add `--stop`."""
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the output before this text; may be given several times",
    )


def sampling_params(options: argparse.Namespace) -> "SamplingParams":
    """Returns how tokens are chosen, by the options of `add_sampling_arguments`.

    Raises:
        VocabtrimError: A value is out of range, or changes nothing because decoding is greedy.
    """
    from runtime import SamplingParams

    check_sampling_options(options)
    chosen = options.temperature, options.top_k, options.top_p, options.seed, options.min_p
    return SamplingParams(*chosen, **rule_options(options))
