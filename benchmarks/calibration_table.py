"""Measure acceptance by K, calibration tokens, source and domain, on prompts that no calibration read.

python benchmarks/calibration_table.py --model MODEL --target DIR --drafter DIR --drafter-alone DIR
    --prompts NAME=FILE [NAME=FILE …] --output STEM

MODEL drafts for itself. --target: its bundle in fp32; --drafter: the same in int4 with its full head (`--k 1000000
--quantize-drafter int4`); --drafter-alone: the target of an export with `--quantize int4`, which generates by itself.
Without --drafter-alone, and with `--target-tokens` of no number and `--most 0`, only texts are counted, for any pair of
bundles; MODEL is either of the two then. Calibration reads the first prompts of each file, all files as one corpus, and
the test the last ones. Acceptance is replayed along the target's own greedy text, see
`vocabtrim_export.head_choice.replay`. Writes STEM.json and STEM.md.

What is done is kept in the directory STEM.work: a run that is stopped goes on from there when it is started again with
the same options. Remove the directory to start again from nothing.
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibration_counts import Counted, calibration_corpus, drafter_counts, model_counts
from files import named, write

from engines import Engine, VocabtrimError, load_engine
from engines.bundle.tokenizer import Tokenizer
from runtime.measure.environment import environment
from vocabtrim_export.calibration import TokenCounts, read_corpus
from vocabtrim_export.calibration.prompts import encode_document
from vocabtrim_export.head_choice.replay import NEVER_KEPT, Text, right_tokens, rounds_of
from vocabtrim_export.head_choice.texts import replayed_texts
from vocabtrim_export.selection import kept_order, structural_token_ids
from vocabtrim_export.sources.source import Source, load_source

DRAFT_LENGTH = 4


@dataclass(frozen=True, slots=True)
class Row:
    """The measured acceptance of a head with K rows on a domain's test prompts.

    Attributes:
        source: The text that chose the rows: "target", "drafter", "text", or "auto", the target's until
            `--calibration-tokens auto` stopped; "full head" for no trim.
        tokens: Tokens counted.
        k: Rows of the head.
        domain: The file of prompts.
        acceptance: The share of the target's tokens that the drafter proposes after all tokens before them.
        block_efficiency: Tokens a round with γ = 4.
        covered: The share of the target's tokens that the head keeps.
    """

    source: str
    tokens: int
    k: int
    domain: str
    acceptance: float
    block_efficiency: float
    covered: float


def main() -> None:
    options = parse()
    source = load_source(options.model, torch.float32)
    files = dict(named(text) for text in options.prompts)
    work = options.output.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    texts = test_texts(options, files, work)
    corpus = calibration_corpus(files, options.calibration_prompts)
    counted = [*model_counts(options, source, corpus, work)]
    counted += drafter_counts(options, corpus, source, work) if options.drafter_alone else []
    always = structural_token_ids(source.tokenizer, source.model.generation_config)
    full = Counted("full head", 0, 0.0, empty(source))
    rows = trimmed_rows(full, full.counts, source.vocab_size, texts, frozenset())
    for each in counted:
        counts = each.counts.resized(source.vocab_size)  # a text's counts lack the head's padding rows
        rows += [row for k in options.k for row in trimmed_rows(each, counts, k, texts, always)]
    report = {
        "model": Path(options.model).name,
        "draft_length": DRAFT_LENGTH,
        "calibration_prompts": options.calibration_prompts,
        "test_prompts": {name: sum(text.domain == name for text in texts) for name in files},
        "test_tokens": {name: sum(len(text.tokens) for text in texts if text.domain == name) for name in files},
        "counted": [{"source": c.source, "tokens": c.tokens, "seconds": round(c.seconds, 1)} for c in counted],
        "enough_for": options.k[0],
        "rows": [asdict(row) for row in rows],
        "environment": environment(),
    }
    write(options.output.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
    write(options.output.with_suffix(".md"), markdown(rows, options.k))
    print(markdown(rows, options.k))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True)
    for name in ("--target", "--drafter"):
        parser.add_argument(name, type=Path, required=True, metavar="DIR")
    parser.add_argument("--drafter-alone", type=Path, metavar="DIR", help="without it no drafter's tokens are counted")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--calibration-prompts", type=int, default=56, help="first prompts of each file to count on")
    parser.add_argument("--test-prompts", type=int, default=12, help="last prompts of each file to test on")
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[1000, 4000, 8000], help="of the prompts' files to count"
    )
    parser.add_argument("--target-tokens", type=int, nargs="*", default=[1000, 4000, 8000], help="of the target's")
    parser.add_argument("--k", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--drafter-tokens", type=int, nargs="*", default=[1000, 4000, 8000], help="of the drafter's")
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=PATH", help="other texts to count")
    parser.add_argument("--text-tokens", type=int, nargs="*", default=[], help="tokens to count of these")
    parser.add_argument(
        "--most", type=int, default=16000, help="tokens at which `auto` stops at the latest; 0: no auto"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="STEM")
    return parser.parse_args()


def test_texts(options: argparse.Namespace, files: dict[str, Path], work: Path) -> list[Text]:
    """The target's greedy continuations of the test prompts, and what the full drafter prefers at each token."""
    place = work / "texts.jsonl"
    done = [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []
    tokenizer = Tokenizer.load(options.target)
    prompts = [
        (name, encode_document(tokenizer, document))
        for name, path in files.items()
        for document in read_corpus([path]).documents[-options.test_prompts :]
    ]
    with ExitStack() as stack, place.open("a") as file:
        target = stack.enter_context(load_engine(options.target))
        drafter = stack.enter_context(load_engine(options.drafter, "cpu", target))
        for prompt in prompts[len(done) :]:
            done.append(replayed(prompt, target, drafter))
            file.write(json.dumps(done[-1]) + "\n")
            file.flush()
            print(f"text {len(done)} of {len(prompts)}", flush=True)
    return [
        Text(
            each["domain"],
            each["prompt"],
            np.array(each["tokens"], np.int64),
            [None if ids is None else np.array(ids, np.int64) for ids in each["preferred"]],
        )
        for each in done
        if each
    ]


def replayed(prompt: tuple[str, list[int]], target: Engine, drafter: Engine) -> dict[str, Any] | None:
    """One text as JSON data; None where the target ends its answer at once."""
    try:
        (text,) = replayed_texts([prompt], target, drafter, lambda _done, _total: None)
    except VocabtrimError:
        return None
    preferred = [None if ids is None else ids.tolist() for ids in text.above]
    return {"domain": text.domain, "prompt": text.prompt, "tokens": text.tokens.tolist(), "preferred": preferred}


def empty(source: Source) -> TokenCounts:
    nothing = np.zeros(source.vocab_size, np.int64)
    return TokenCounts(nothing, nothing, source.tokenizer_digest, ())


def trimmed_rows(
    counted: Counted, counts: TokenCounts, k: int, texts: Sequence[Text], always: frozenset[int]
) -> list[Row]:
    """Measure a head of the K tokens that were counted most often, on each domain and on all."""
    full_vocab = counts.full_vocab
    order, _ = kept_order(counts, always, full_vocab, None)
    row_of = np.full(full_vocab, NEVER_KEPT)
    row_of[order] = np.arange(len(order))
    rows = []
    for domain in [*dict.fromkeys(text.domain for text in texts), "all"]:
        inside = [text for text in texts if domain in (text.domain, "all")]
        right = [right_tokens(text, row_of, k, 0) for text in inside]
        tokens = sum(map(len, right))
        rounds = sum(rounds_of(each, DRAFT_LENGTH) for each in right)
        kept = sum(int((row_of[text.tokens] < k).sum()) for text in inside)
        shares = sum(int(each.sum()) for each in right) / tokens, tokens / rounds, kept / tokens
        rows.append(Row(counted.source, counted.tokens, k, domain, *shares))
    return rows


def markdown(rows: Sequence[Row], ks: Sequence[int]) -> str:
    """Acceptance, a line for each source and number of tokens, a table for each K."""
    domains = list(dict.fromkeys(row.domain for row in rows))
    full = [row for row in rows if row.source == "full head"]
    parts = []
    for k in ks:
        lines = [f"| K = {k:,} | tokens | {' | '.join(domains)} |", f"|---|---|{'---|' * len(domains)}"]
        own = [row for row in rows if row.k == k and row.source != "full head"]
        for source, tokens in dict.fromkeys((row.source, row.tokens) for row in [*full, *own]):
            cells = [row for row in [*full, *own] if (row.source, row.tokens) == (source, tokens)]
            shown = " | ".join(f"{row.acceptance:.1%} ({row.block_efficiency:.2f})" for row in cells)
            lines.append(f"| {source} | {f'{tokens:,}' if tokens else ''} | {shown} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
