"""The token counts that `calibration_table.py` compares: of the text, the target's and the drafter's generations."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from files import named

from engines import load_engine
from engines.bundle.tokenizer import Tokenizer
from runtime import SamplingParams, SpeculativeDecoder
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
from vocabtrim_export.sources.precision import calibration_model
from vocabtrim_export.sources.source import Source

NEW_TOKENS = 128  # of a generation that is counted


@dataclass(frozen=True, slots=True)
class Counted:
    """Token counts from one source, `tokens` of them, `seconds` after the source's counting began."""

    source: str
    tokens: int
    seconds: float
    counts: TokenCounts


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
    """Count texts, and what the target generates: at each number of tokens, and until `auto` stops."""
    jobs = [("text", tokens, corpus, CountSettings("text", tokens)) for tokens in options.tokens]
    for name, path in map(named, options.text):
        text = read_corpus([path])
        jobs += [(name, tokens, text, CountSettings("text", tokens)) for tokens in options.text_tokens]
    jobs += [("target", tokens, corpus, CountSettings("target", tokens)) for tokens in options.target_tokens]
    if options.most:
        settings = CountSettings("target", options.most, enough_for=options.k[0])
        jobs += [("auto", options.most, corpus, settings)]
    events = CountEvents(on_look=lambda look: print(look, flush=True))
    with calibration_model(source.model) as model:
        before: dict[str, float] = {}
        before_tokens: dict[str, int] = {}
        for name, tokens, documents, settings in jobs:
            counted, began = finished(work, name, tokens), perf_counter()
            if counted is None:  # each goes on from the one before, an interrupted one from where it was
                checkpoint = work / f"{name}.safetensors"
                counts = calibrate(model, source.tokenizer, documents, settings, checkpoint=checkpoint, events=events)
                seconds = before.get(name, 0.0) + perf_counter() - began
                counted = finish(work, tokens, Counted(name, counts.total, seconds, counts))
            before[name] = counted.seconds
            if counted.tokens > before_tokens.get(name, 0):  # else the text had no more
                yield counted
            before_tokens[name] = counted.tokens


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
        for tokens in options.drafter_tokens:
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
