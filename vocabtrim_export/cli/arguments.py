"""Options that several commands share, so that they have the same names and help texts everywhere."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import VocabtrimError
from vocabtrim_export.cli.prompt_arguments import add_template_arguments, template_args

if TYPE_CHECKING:
    from runtime.pair import Auto
    from vocabtrim_export.calibration.counting import CalibrationSettings


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `calibration_settings` reads."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="prompts, conversations or texts to count on: text, .jsonl, .json, .csv, .tsv or .parquet files (see "
        "docs/conversations.md), also compressed (.gz, .bz2, .xz, .zst), directories of such files, or data sets of "
        "the hub (hf://OWNER/NAME). Or token counts (.safetensors) of earlier calibrations. Files given as "
        "NAME=PATH[:WEIGHT] are domains, which are counted separately and mixed by weight (default: Python's "
        "documentation, which is unlike most users' prompts)",
    )
    group.add_argument(
        "--calibration-source",
        choices=["target", "drafter", "text"],
        help="what to count: the tokens that the target or the drafter generates on the prompts, or those of the text "
        "itself (default: target, or drafter if there is no target)",
    )
    group.add_argument(
        "--calibration-tokens",
        type=calibration_tokens,
        default="auto",
        metavar="N",
        help="how many tokens to count; auto stops when more tokens would hardly change which ones K keeps",
    )
    _add_generation_arguments(group)


def _add_generation_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--calibration-endpoint",
        metavar="URL",
        help="let a server with OpenAI's protocol (vLLM, SGLang, llama.cpp) generate, such as "
        "http://localhost:8000/v1; its key is read from the environment variable OPENAI_API_KEY",
    )
    group.add_argument("--calibration-model", metavar="NAME", help="the model's name on that server")
    group.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="count or generate on the Ray cluster at ADDRESS, such as head:6379; without ADDRESS, on the cluster that "
        "runs on this machine, else on all its cores. The counts equal those of one process",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="sampling temperature of the generations that are counted; 0: greedy",
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the sampling of these generations")
    add_template_arguments(group)


def calibration_tokens(text: str) -> "int | Auto":
    """Parse `--calibration-tokens`: a number, or "auto"."""
    return "auto" if text == "auto" else int(text)


def calibration_settings(options: argparse.Namespace) -> "CalibrationSettings":
    """Returns the settings from the options of `add_calibration_arguments`."""
    from vocabtrim_export.calibration.counting import CalibrationSettings

    return CalibrationSettings(
        tuple(options.calibration),
        options.calibration_source,
        options.calibration_tokens,
        options.temperature,
        options.seed,
        options.calibration_endpoint,
        options.calibration_model,
        options.ray,
        options.chat_template,
        template_args(options),
    )


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


def add_format_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--format`."""
    from vocabtrim_export.formats import FORMATS

    parser.add_argument(
        "--format",
        nargs="+",
        choices=["onnx", "trt", *FORMATS],
        default=["onnx"],
        metavar="FORMAT",
        help="onnx (the default): bundles for ONNX Runtime; trt: bundles with TensorRT plans. Other programs' formats, "
        f"each written to DIR/FORMAT in addition: {', '.join(FORMATS)} (see docs/formats.md)",
    )


def other_formats(options: argparse.Namespace) -> tuple[str, ...]:
    """Returns the formats that `--format` names in addition to the bundles, each once."""
    return tuple(name for name in dict.fromkeys(options.format) if name not in ("onnx", "trt"))


def draft_length(text: str) -> "int | Auto":
    """Parse `--draft-length`: a number, or "auto"."""
    return "auto" if text == "auto" else int(text)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the bundles, the device and the draft length."""
    parser.add_argument("--target", type=Path, required=True, metavar="DIR", help="the target's bundle")
    parser.add_argument("--device", default="cpu", help="where the models run: cpu or cuda")
    parser.add_argument("--drafter-device", metavar="DEVICE", help="where the drafter runs (default: as --device)")
    parser.add_argument(
        "--draft-length",
        type=draft_length,
        metavar="N",
        help="tokens drafted per round (γ); auto, the default with a drafter: as many as save time on this text and "
        "machine, up to 16 on the CPU, 1, 3 or 7 on a GPU; auto without a drafter: prompt lookup alone",
    )


def add_prompt_lookup_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--no-prompt-lookup`."""
    parser.add_argument(
        "--no-prompt-lookup",
        action="store_false",
        dest="prompt_lookup",
        help="with --draft-length auto: do not draft text that repeats an earlier part of the prompt or the output",
    )


def add_json_argument(parser: argparse._ActionsContainer) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
