"""Options of the commands that generate text: which bundles, and how tokens are chosen."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vocabtrim_export.cli.arguments import (
    add_engine_arguments,
    add_prompt_lookup_argument,
    add_rule_arguments,
    rule_options,
)
from vocabtrim_export.cli.combinations import check_drafter_options, check_sampling_options

if TYPE_CHECKING:
    from runtime import SamplingParams, SpeculativeDecoder


def add_decoder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `load_decoder` reads."""
    add_engine_arguments(parser)
    add_prompt_lookup_argument(parser)
    parser.add_argument("--drafter", type=Path, metavar="DIR", help="the drafter's bundle (default: the target alone)")


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
    """Add `--stop` and the options that `sampling_params` reads."""
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the output before this text; may be given several times",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0: greedy, always the most likely token"
    )
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k most likely tokens; 0: from all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the most likely tokens whose probabilities reach this sum"
    )
    parser.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="sample from the tokens that have at least this share of the most likely token's probability",
    )
    parser.add_argument("--seed", type=int, help="seed of the sampling (default: another one each time)")
    add_rule_arguments(parser)


def sampling_params(options: argparse.Namespace) -> "SamplingParams":
    """Returns how tokens are chosen, by the options of `add_sampling_arguments`.

    Raises:
        VocabtrimError: A value is out of range, or changes nothing because decoding is greedy.
    """
    from runtime import SamplingParams

    check_sampling_options(options)
    chosen = options.temperature, options.top_k, options.top_p, options.seed, options.min_p
    return SamplingParams(*chosen, **rule_options(options))
