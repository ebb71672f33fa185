"""Refuses options that would have no effect together with others."""

import argparse
from collections.abc import Mapping
from typing import Any

from engines.errors import VocabtrimError

_OF_SAMPLING = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": None}


def check_drafter_options(options: argparse.Namespace) -> None:
    """Refuse options of a drafter where there is none.

    Raises:
        VocabtrimError: Such an option was given.
    """
    if options.drafter is None:
        refuse_stated(options, {"drafter_device": None}, "is for a drafter: give --drafter as well")
        if isinstance(options.draft_length, int):
            raise VocabtrimError(
                "--draft-length as a number is for a drafter: give --drafter as well, or auto for prompt lookup alone"
            )


def check_sampling_options(options: argparse.Namespace) -> None:
    """Refuse options of sampling where decoding is greedy.

    Raises:
        VocabtrimError: Such an option was given.
    """
    if options.temperature == 0:
        refuse_stated(options, _OF_SAMPLING, "changes nothing in greedy decoding: give a --temperature as well")


def refuse_stated(options: argparse.Namespace, defaults: Mapping[str, Any], why: str) -> None:
    """Refuse the first option that is not at its default.

    Args:
        options: The parsed options.
        defaults: The options' names in `options` and their defaults.
        why: The rest of the sentence that begins with the option.

    Raises:
        VocabtrimError: An option is not at its default.
    """
    for name, default in defaults.items():
        if getattr(options, name) != default:
            raise VocabtrimError(f"--{name.replace('_', '-')} {why}")
