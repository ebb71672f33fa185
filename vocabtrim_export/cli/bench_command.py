"""Measure what a drafter gains: all ways of decoding in one run, interleaved, warmed up, medians."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from vocabtrim_export.cli.arguments import add_engine_arguments, add_json_argument
from vocabtrim_export.cli.console import print_table, progress_reporter

if TYPE_CHECKING:
    from runtime import BenchReport, ModeReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    parser.add_argument("--drafter", type=Path, required=True, metavar="DIR", help="the trimmed drafter's bundle")
    parser.add_argument(
        "--baseline-drafter", type=Path, metavar="DIR", help="a bundle of the same drafter with its full head"
    )
    parser.add_argument(
        "--prompts", type=Path, nargs="+", required=True, metavar="PATH", help="files as --calibration takes them"
    )
    parser.add_argument("--num-prompts", type=int, default=8, metavar="N", help="prompts to use, from the first on")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens to generate at most")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each prompt in each mode")
    add_json_argument(parser)


def run(options: argparse.Namespace) -> None:
    from contextlib import ExitStack

    from engines import VocabtrimError, load_engine
    from engines.tokenizer import Tokenizer
    from runtime import SpeculativeDecoder, bench
    from vocabtrim_export.calibration import read_corpus

    if options.num_prompts < 1:
        raise VocabtrimError(f"--num-prompts is {options.num_prompts}: give 1 or more")
    documents = read_corpus(options.prompts).documents[: options.num_prompts]
    paths = {"full_drafter": options.baseline_drafter, "trimmed_drafter": options.drafter}
    with ExitStack() as stack:
        target = stack.enter_context(load_engine(options.target, options.device))
        drafters = {
            mode: stack.enter_context(load_engine(path, options.device, target)) for mode, path in paths.items() if path
        }
        decoder = SpeculativeDecoder(target, tokenizer=Tokenizer.load(options.target))
        messages = [[{"role": m.role, "content": m.content} for m in document.prompt] for document in documents]
        prompts = [decoder.encode(chat or document.text) for chat, document in zip(messages, documents, strict=True)]
        with progress_reporter() as progress:
            report = bench(
                target,
                drafters,
                prompts,
                max_new_tokens=options.max_new_tokens,
                draft_length=options.draft_length,
                repeats=options.repeats,
                progress=lambda done, total: progress("bench", done, total),
            )
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        show(report)


def show(report: "BenchReport") -> None:
    title = (
        f"{report.prompts} prompts, {report.max_new_tokens} new tokens, γ = {report.draft_length}, greedy, "
        f"medians of {report.repeats}; memory reads {report.bandwidth / 1e9:.1f} GB/s"
    )
    rows = {
        "tokens/s": lambda m: f"{m.tokens_per_second:.1f}",
        "speed-up, measured": lambda m: f"{m.speedup:.2f}×",
        "speed-up, memory-bound (MBSU)": lambda m: f"{m.mbsu:.2f}×",
        "block efficiency": lambda m: f"{m.block_efficiency:.2f}",
        "accepted, by position": lambda m: " ".join(f"{share:.0%}" for share in m.acceptance) or "-",
        "ms a draft step": lambda m: _number(m.draft_step_ms),
        "ms a verification (target only: a step)": lambda m: _number(m.verify_ms),
        "MB read a step": lambda m: f"{m.bytes_per_step / 1e6:.1f}",
        "of the measured bandwidth": lambda m: "-" if m.bandwidth_fraction is None else f"{m.bandwidth_fraction:.0%}",
        "coverage of held-out tokens": lambda m: "-" if m.coverage is None else f"{m.coverage:.2%}",
        "time outside the engines": lambda m: f"{m.overhead:.2%}",
        "prompts equal to target only": lambda m: f"{m.equal_prompts}/{report.prompts}",
    }
    modes: list[ModeReport] = list(report.modes.values())
    columns = ["", *(name.replace("_", " ") for name in report.modes)]
    print_table(title, columns, [[name, *map(value, modes)] for name, value in rows.items()])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
