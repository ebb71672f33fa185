"""Measure acceptance by K, calibration tokens, source and domain, on prompts that no calibration read.

python benchmarks/calibration_table.py --model MODEL --target DIR --drafter DIR --drafter-alone DIR
    --prompts NAME=FILE [NAME=FILE …] --output STEM

MODEL drafts for itself. --target: its bundle in fp32; --drafter: the same in int4 with its full head (`--k 1000000
--quantize-drafter int4`); --drafter-alone: the target of an export with `--quantize int4`, which generates by itself.
Calibration reads the first prompts of each file, all files as one corpus, and the test the last ones. Acceptance is
replayed along the target's own greedy text, see `vocabtrim_export.head_choice.replay`. Writes STEM.json and STEM.md.

What is done is kept in the directory STEM.work: a run that is stopped goes on from there when it is started again with
the same options. Remove the directory to start again from nothing.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from engines import Engine, VocabtrimError, load_engine
from engines.bundle.tokenizer import Tokenizer
from runtime import SamplingParams, SpeculativeDecoder
from runtime.measure.environment import environment
from vocabtrim_export.calibration import (
    CalibrationRun,
    Corpus,
    CountEvents,
    CountSettings,
    Document,
    Message,
    TokenCounts,
    calibrate,
    read_corpus,
)
from vocabtrim_export.calibration.counts import is_held_out
from vocabtrim_export.calibration.prompts import encode_document
from vocabtrim_export.head_choice.replay import NEVER_KEPT, Text, right_tokens, rounds_of
from vocabtrim_export.head_choice.texts import replayed_texts
from vocabtrim_export.selection import kept_order, structural_token_ids
from vocabtrim_export.sources.precision import calibration_model
from vocabtrim_export.sources.source import Source, load_source

DRAFT_LENGTH = 4
NEW_TOKENS = 128  # of a generation that is counted


@dataclass(frozen=True, slots=True)
class Counted:
    """Token counts from one source, `tokens` of them, `seconds` after the source's counting began."""

    source: str
    tokens: int
    seconds: float
    counts: TokenCounts


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
    counted = [*model_counts(options, source, corpus, work), *drafter_counts(options, corpus, source, work)]
    always = structural_token_ids(source.tokenizer, source.model.generation_config)
    rows = trimmed_rows(Counted("full head", 0, 0.0, empty(source)), source.vocab_size, texts, frozenset())
    for each in counted:
        rows += [row for k in options.k for row in trimmed_rows(each, k, texts, always)]
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
    for name in ("--target", "--drafter", "--drafter-alone"):
        parser.add_argument(name, type=Path, required=True, metavar="DIR")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--calibration-prompts", type=int, default=56, help="first prompts of each file to count on")
    parser.add_argument("--test-prompts", type=int, default=12, help="last prompts of each file to test on")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 4000, 8000], help="tokens to count")
    parser.add_argument("--k", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--most", type=int, default=16000, help="tokens at which `auto` stops at the latest")
    parser.add_argument("--output", type=Path, required=True, metavar="STEM")
    return parser.parse_args()


def named(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    return name, Path(path)


def calibration_corpus(files: dict[str, Path], prompts: int) -> Corpus:
    """The first prompts of each file, each with its reference answer where the file has one."""
    documents = [document for path in files.values() for document in with_answers(path)[:prompts]]
    return Corpus.of(documents, f"{', '.join(files)} ({len(documents)} documents)")


def with_answers(path: Path) -> list[Document]:
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [
        Document(f"{asked}\n\n{answer}", (Message("user", asked),), parts=(asked, answer), answers=(answer,))
        if answer
        else Document(asked, (Message("user", asked),), parts=(asked,))
        for asked, answer in ((each["turns"][0], (each.get("reference") or [""])[0]) for each in records)
    ]


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


def finished(work: Path, source: str, tokens: int) -> Counted | None:
    """Read the counts of an earlier run; None if there are none."""
    place = work / f"{source}-{tokens}.safetensors"
    if not place.exists():
        return None
    counts, seconds = TokenCounts.load(place), json.loads(place.with_suffix(".json").read_text())
    return Counted(source, counts.total, seconds, counts)


def finish(work: Path, tokens: int, counted: Counted) -> Counted:
    place = work / f"{counted.source}-{tokens}.safetensors"
    place.with_suffix(".json").write_text(json.dumps(counted.seconds))
    counted.counts.save(place)
    print(f"{counted.source}: {counted.tokens} tokens in {counted.seconds:.0f} s", flush=True)
    return counted


def model_counts(options: argparse.Namespace, source: Source, corpus: Corpus, work: Path) -> Iterator[Counted]:
    """Count the text itself, and what the target generates: at each number of tokens, and until `auto` stops."""
    jobs = [("text", tokens, CountSettings("text", tokens)) for tokens in options.tokens]
    jobs += [("target", tokens, CountSettings("target", tokens)) for tokens in options.tokens]
    jobs += [("auto", options.most, CountSettings("target", options.most, enough_for=options.k[0]))]
    events = CountEvents(on_look=lambda look: print(look, flush=True))
    with calibration_model(source.model) as model:
        before: dict[str, float] = {}
        for name, tokens, settings in jobs:
            counted, began = finished(work, name, tokens), perf_counter()
            if counted is None:  # each goes on from the one before, an interrupted one from where it was
                checkpoint = work / f"{name}.safetensors"
                counts = calibrate(model, source.tokenizer, corpus, settings, checkpoint=checkpoint, events=events)
                seconds = before.get(name, 0.0) + perf_counter() - began
                counted = finish(work, tokens, Counted(name, counts.total, seconds, counts))
            before[name] = counted.seconds
            yield counted


def drafter_counts(options: argparse.Namespace, corpus: Corpus, source: Source, work: Path) -> Iterator[Counted]:
    """Count what the quantised model samples at temperature 1, by the product's own engine."""
    order = np.random.default_rng(0).permutation(len(corpus.documents)).tolist()
    sums, turn, seconds = np.zeros((2, source.vocab_size), np.int64), 0, 0.0
    place = work / "drafter.npz"
    if place.exists():
        with np.load(place) as saved:
            sums, turn, seconds = saved["sums"], int(saved["turn"]), float(saved["seconds"])
    began = perf_counter() - seconds
    with load_engine(options.drafter_alone) as engine:
        tokenizer = Tokenizer.load(options.drafter_alone)
        decoder = SpeculativeDecoder(engine, tokenizer=tokenizer)
        for tokens in options.tokens:
            counted = finished(work, "drafter", tokens)
            while counted is None and sums.sum() < tokens:
                index = order[turn % len(order)]
                prompt = encode_document(tokenizer, corpus.documents[index])[-128:]
                sampling = SamplingParams(temperature=1.0, seed=turn)
                ids = decoder.generate(prompt, max_new_tokens=NEW_TOKENS, sampling=sampling).token_ids
                sums[int(is_held_out(index, len(order)))] += np.bincount(ids, minlength=source.vocab_size)
                turn += 1
                np.savez(place, sums=sums, turn=turn, seconds=perf_counter() - began)
            if counted is None:
                run = CalibrationRun("drafter", corpus.digest, 0, tokens=int(sums.sum()))
                counts = TokenCounts(sums[0], sums[1], source.tokenizer_digest, (run,))
                counted = finish(work, tokens, Counted("drafter", counts.total, perf_counter() - began, counts))
            yield counted


def empty(source: Source) -> TokenCounts:
    nothing = np.zeros(source.vocab_size, np.int64)
    return TokenCounts(nothing, nothing, source.tokenizer_digest, ())


def trimmed_rows(counted: Counted, k: int, texts: Sequence[Text], always: frozenset[int]) -> list[Row]:
    """Measure a head of the K tokens that were counted most often, on each domain and on all."""
    full_vocab = counted.counts.full_vocab
    order, _ = kept_order(counted.counts, always, full_vocab, None)
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


def write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, "utf-8")  # written whole or not at all
    aside.replace(path)


if __name__ == "__main__":
    main()
