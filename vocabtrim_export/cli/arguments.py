"""Options that several commands share, so that they have the same names and words everywhere."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import VocabtrimError
from vocabtrim_export.cli.prompt_arguments import add_template_arguments, template_args

if TYPE_CHECKING:
    from runtime.pair import Auto
    from vocabtrim_export.calibration.counting import CalibrationSettings
    from vocabtrim_export.trt.settings import TensorRTSettings


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="text files, .jsonl, .json, .csv, .tsv or .parquet files of prompts, conversations or texts (see "
        "docs/conversations.md), also compressed (.gz, .bz2, .xz, .zst), directories of these; or token counts "
        "(.safetensors) of earlier calibrations. As NAME=PATH[:WEIGHT] they are domains, counted apart and mixed by "
        "weight. Without it a corpus that comes with Python stands in",
    )
    parser.add_argument(
        "--calibration-source",
        choices=["target", "drafter", "text"],
        help="whose tokens to count: what the target or the drafter generates on the prompts, or the text itself "
        "(default: target where there is one, else drafter)",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=calibration_tokens,
        default="auto",
        metavar="N",
        help="tokens to count, or auto (the default): until more would change little for this K",
    )
    parser.add_argument(
        "--calibration-endpoint",
        metavar="URL",
        help="a server with OpenAI's protocol (vLLM, SGLang, llama.cpp) that generates instead, such as "
        "http://localhost:8000/v1; its key is read from the environment variable OPENAI_API_KEY",
    )
    parser.add_argument("--calibration-model", metavar="NAME", help="the model's name at the endpoint")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling that calibrates")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling that calibrates")
    add_template_arguments(parser)


def calibration_tokens(text: str) -> "int | Auto":
    """`--calibration-tokens N`, or auto."""
    return "auto" if text == "auto" else int(text)


def calibration_settings(options: argparse.Namespace) -> "CalibrationSettings":
    """What `add_calibration_arguments` parsed."""
    from vocabtrim_export.calibration.counting import CalibrationSettings

    return CalibrationSettings(
        tuple(options.calibration),
        options.calibration_source,
        options.calibration_tokens,
        options.temperature,
        options.seed,
        options.calibration_endpoint,
        options.calibration_model,
        options.chat_template,
        template_args(options),
    )


def add_rule_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "rules on logits", "greedy and sampled; without one, the model's generation config decides"
    )
    group.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="above 1: tokens of prompt and output are less likely"
    )
    group.add_argument(
        "--presence-penalty", type=float, default=0.0, metavar="X", help="subtracted from logits of the output's tokens"
    )
    group.add_argument(
        "--frequency-penalty", type=float, default=0.0, metavar="X", help="the same, for each time that they occur"
    )
    group.add_argument(
        "--logit-bias", nargs="+", default=[], metavar="ID=X", help="added to the logits of these token ids"
    )
    group.add_argument(
        "--no-repeat-ngram-size", type=int, metavar="N", help="no sequence of N tokens twice; 0 allows it"
    )
    group.add_argument("--suppress-tokens", type=int, nargs="*", metavar="ID", help="token ids that are never chosen")
    group.add_argument("--min-new-tokens", type=int, metavar="N", help="tokens before which no EOS is chosen")


def rule_options(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_rule_arguments` parsed, as arguments of `SamplingParams`. Raises `VocabtrimError`."""
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
    from vocabtrim_export.formats import FORMATS

    parser.add_argument(
        "--format",
        nargs="+",
        choices=["onnx", "trt", *FORMATS],
        default=["onnx"],
        metavar="FORMAT",
        help="onnx (the default): bundles for ONNX Runtime; trt: bundles with TensorRT engines; in addition, each in "
        f"DIR/FORMAT: {', '.join(FORMATS)} (docs/formats.md)",
    )


def other_formats(options: argparse.Namespace) -> tuple[str, ...]:
    """What `--format` names beyond the bundles, each once."""
    return tuple(name for name in dict.fromkeys(options.format) if name not in ("onnx", "trt"))


def add_tensorrt_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --format trt")
    group.add_argument(
        "--trt-flavor",
        choices=["auto", "tensorrt", "rtx", "none"],
        default="auto",
        help="tensorrt: builds for the GPU of this machine; rtx: TensorRT-RTX, builds without a GPU; auto: tensorrt "
        "where it is installed and there is a GPU, else rtx; none: the graphs alone",
    )
    group.add_argument(
        "--compute-capability",
        nargs="+",
        default=[],
        metavar="X.Y",
        help="of the GPUs to build for, such as 8.6 8.9 (rtx; default: all from 8.0 on)",
    )
    group.add_argument(
        "--draft-length", type=int, default=4, metavar="N", help="tokens verified per round, less one (γ)"
    )
    group.add_argument(
        "--unroll-draft", action="store_true", help="build an engine that drafts all γ tokens in one call as well"
    )
    group.add_argument("--prefill-chunk", type=int, default=256, metavar="N", help="tokens of a prompt read per call")
    group.add_argument(
        "--span",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="lengths below --max-length to build for as well: a text takes as long as the next longer one",
    )
    group.add_argument("--strip-weights", action="store_true", help="plans without weights; loading reads the graph's")
    group.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="kernel timings to reuse and to add to (tensorrt)"
    )
    group.add_argument(
        "--version-compatible",
        action="store_true",
        help="plans that the lean runtime of TensorRT opens as well, a tenth of its size (tensorrt)",
    )
    group.add_argument("--verbose", action="store_true", help="show what TensorRT logs while it builds")


def tensorrt_settings(options: argparse.Namespace) -> "TensorRTSettings | None":
    """What `add_tensorrt_arguments` parsed; None for another format."""
    if {"onnx", "trt"} <= set(options.format):
        raise VocabtrimError(
            "--format onnx and --format trt make the same bundles: give one here, the other its own --output"
        )
    if "trt" not in options.format:
        switches = ("unroll_draft", "strip_weights", "version_compatible")
        for name in ("compute_capability", "span", "timing_cache", *switches):
            if getattr(options, name):
                raise VocabtrimError(f"--{name.replace('_', '-')} is for TensorRT: give --format trt as well")
        return None
    from vocabtrim_export.trt.settings import TensorRTSettings

    return TensorRTSettings(
        flavor=options.trt_flavor,
        compute_capabilities=tuple(options.compute_capability),
        draft_length=options.draft_length,
        prefill_chunk=options.prefill_chunk,
        spans=tuple(options.span),
        unroll=options.unroll_draft,
        strip_weights=options.strip_weights,
        timing_cache=options.timing_cache,
        version_compatible=options.version_compatible,
    )


def draft_length(text: str) -> "int | Auto":
    """`--draft-length N`, or auto."""
    return "auto" if text == "auto" else int(text)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", type=Path, required=True, metavar="DIR", help="the target's bundle")
    parser.add_argument("--device", default="cpu", help="where the engines run: cpu or cuda")
    parser.add_argument("--drafter-device", metavar="DEVICE", help="where the drafter runs (default: as the target)")
    parser.add_argument(
        "--draft-length",
        type=draft_length,
        metavar="N",
        help="tokens drafted per round (γ), or auto, the default on the CPU: up to 16, as many as are worth their time "
        "on this text and machine (default elsewhere: 4, or fewer where the target verifies no more)",
    )


def add_prompt_lookup_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-prompt-lookup",
        action="store_false",
        dest="prompt_lookup",
        help="where the draft length is auto: never draft what the text itself repeats",
    )


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
