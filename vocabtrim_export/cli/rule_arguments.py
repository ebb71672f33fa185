"""Options of the rules on logits, which apply to greedy and to sampled decoding."""

import argparse
from typing import Any

from engines.errors import VocabtrimError


def add_rule_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `rule_options` reads."""
    group = parser.add_argument_group(
        "rules on logits",
        "They apply to greedy and to sampled decoding. The model's generation config sets those that are not given.",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="make tokens that are in the prompt or the output less likely, by this factor; 1: off",
    )
    group.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="subtract X from the logit of each token that is in the output",
    )
    group.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="subtract X from a token's logit for each time that it is in the output",
    )
    _add_restrictions(group)


def _add_restrictions(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--logit-bias", nargs="+", default=[], metavar="ID=X", help="add X to the logit of the token with this id"
    )
    group.add_argument(
        "--no-repeat-ngram-size",
        type=int,
        metavar="N",
        help="never repeat a sequence of N tokens; 0: off",
    )
    group.add_argument("--suppress-tokens", type=int, nargs="*", metavar="ID", help="never choose these token ids")
    group.add_argument(
        "--min-new-tokens", type=int, metavar="N", help="choose no end-of-sequence token (EOS) before N tokens"
    )


def rule_options(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of `add_rule_arguments` as keyword arguments of `SamplingParams`.

    Raises:
        VocabtrimError: A value of `--logit-bias` is not ID=X.
    """
    biases: dict[int, float] = {}
    for text in options.logit_bias:
        token, _, bias = text.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise VocabtrimError(f"--logit-bias {text}: give a token id and a number, such as 42=-5") from None
    suppressed = options.suppress_tokens
    return {
        "repetition_penalty": options.repetition_penalty,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "logit_bias": biases,
        "no_repeat_ngram_size": options.no_repeat_ngram_size,
        "suppress_tokens": None if suppressed is None else tuple(suppressed),
        "min_new_tokens": options.min_new_tokens,
    }
