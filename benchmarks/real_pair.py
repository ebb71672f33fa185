"""Measure the speed-up of drafters on real weights, at fixed and adaptive draft lengths, on prompts by domain.

python benchmarks/real_pair.py --target DIR --drafter NAME=DIR [NAME=DIR …] --prompts NAME=FILE [NAME=FILE …]
    [--random-tokens] [--without-lookup] --output STEM

One interleaved run: on each prompt every way of decoding takes its turn, and they take turns in who begins, so that a
machine that slows down slows all of them. Greedy, in time without prefills. An adaptive way keeps its state from prompt
to prompt, as a decoder does; nothing else is warm but the engines. Writes STEM.json, STEM.md and STEM.svg.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from files import named, write
from real_pair_rows import TARGET_ONLY, Generation, summarize
from real_pair_views import markdown, svg

from engines import load_engine
from engines.base import Engine
from engines.bundle.read import Manifest
from engines.bundle.tokenizer import Tokenizer
from runtime import Round, SpeculativeDecoder, decode_rounds
from runtime.adaptive_length import AdaptiveLength
from runtime.draft_length import DraftLength, FixedLength
from runtime.measure.environment import environment
from runtime.pair import make_draft_length
from vocabtrim_export.calibration import read_corpus

RANDOM_TOKENS = 64  # of a prompt of random tokens


@dataclass(slots=True)
class Way:
    """One way of decoding. length: keeps what it learns. drafter: None for the target alone."""

    name: str
    drafter: Engine | None
    length: DraftLength


def main() -> None:
    options = parse()
    with ExitStack() as stack:
        target = stack.enter_context(load_engine(options.target))
        drafters = {
            name: stack.enter_context(load_engine(path, "cpu", target)) for name, path in map(named, options.drafter)
        }
        prompts = {name: list(read_prompts(target, options, path)) for name, path in map(named, options.prompts)}
        if options.random_tokens:
            prompts["random tokens"] = random_prompts(target, options.num_prompts)
        ways = make_ways(target, drafters, options.lengths, options.without_lookup)
        warm_up(target, ways, next(iter(prompts.values()))[0])
        bundles = {name: drafter.manifest for name, drafter in {TARGET_ONLY: target, **drafters}.items()}
        generations: list[Generation] = []
        for own in measure(target, ways, prompts, options.max_new_tokens):
            generations += own
            save(options, bundles, generations)  # a run that is stopped keeps what it has
    print(markdown(summarize(generations)))


def save(options: argparse.Namespace, bundles: Mapping[str, Manifest], generations: Sequence[Generation]) -> None:
    rows = summarize(generations)
    alone = [each.domain for each in generations if each.way == TARGET_ONLY]
    report = {
        "bundles": {
            name: {"source": Path(m.source).name, "head_rows": m.head_rows, "quantization": m.quantization}
            for name, m in bundles.items()
        },
        "max_new_tokens": options.max_new_tokens,
        "prompts": dict(Counter(alone)),
        "rows": [asdict(row) for row in rows],
        "generations": [asdict(each) for each in generations],
        "environment": environment(),
    }
    write(options.output.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
    write(options.output.with_suffix(".md"), markdown(rows))
    write(options.output.with_suffix(".svg"), svg(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--target", type=Path, required=True, metavar="DIR")
    parser.add_argument("--drafter", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--random-tokens", action="store_true", help="a domain of random token ids as well")
    parser.add_argument("--skip", type=int, default=0, help="prompts of each file to leave out")
    parser.add_argument("--num-prompts", type=int, default=3, help="prompts of each file")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1, 2, 3, 4, 6, 8], help="fixed draft lengths")
    parser.add_argument("--without-lookup", action="store_true", help="adaptive lengths also without prompt lookup")
    parser.add_argument("--output", type=Path, required=True, metavar="STEM")
    return parser.parse_args()


def read_prompts(target: Engine, options: argparse.Namespace, path: Path) -> Iterator[list[int]]:
    """The token ids of a file's prompts, of those that leave room for what is generated."""
    decoder = SpeculativeDecoder(target, tokenizer=Tokenizer.load(options.target))
    documents = read_corpus([path]).documents[options.skip : options.skip + options.num_prompts]
    for document in documents:
        messages = [{"role": message.role, "content": message.content} for message in document.prompt]
        ids = decoder.encode(messages or document.text)
        if len(ids) + options.max_new_tokens <= target.capacity:
            yield ids


def random_prompts(target: Engine, count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    ids: list[list[int]] = rng.integers(target.manifest.vocab_size, size=(count, RANDOM_TOKENS)).tolist()
    return ids


def make_ways(
    target: Engine, drafters: Mapping[str, Engine], lengths: Sequence[int], without_lookup: bool
) -> list[Way]:
    ways = [Way(TARGET_ONLY, None, FixedLength(1))]
    for name, drafter in drafters.items():
        ways += [Way(f"{name}, γ = {length}", drafter, FixedLength(length)) for length in lengths]
        if without_lookup:
            adaptive = make_draft_length(target, drafter, "auto", prompt_lookup=False)
            ways.append(Way(f"{name}, adaptive, no lookup", drafter, adaptive))
        ways.append(Way(f"{name}, adaptive", drafter, make_draft_length(target, drafter, "auto")))
    return ways


def warm_up(target: Engine, ways: Sequence[Way], prompt: Sequence[int]) -> None:
    for way in ways:
        length = FixedLength(4) if isinstance(way.length, AdaptiveLength) else way.length  # it learns nothing here
        run(target, Way(way.name, way.drafter, length), prompt, 16)


def run(target: Engine, way: Way, prompt: Sequence[int], tokens: int) -> list[Round]:
    return list(decode_rounds(target, way.drafter, prompt, max_new_tokens=tokens, draft_length=way.length))


def measure(
    target: Engine, ways: Sequence[Way], prompts: Mapping[str, Sequence[Sequence[int]]], tokens: int
) -> Iterator[list[Generation]]:
    """Each prompt in all ways, the domains in turn, so that what an adaptive way learns on one it meets on the next."""
    longest = max(map(len, prompts.values()))
    order = [(name, each[i]) for i in range(longest) for name, each in prompts.items() if i < len(each)]
    for turn, (domain, prompt) in enumerate(order):
        first = turn % len(ways)
        done = {way.name: run(target, way, prompt, tokens) for way in [*ways[first:], *ways[:first]]}
        alone = tokens_of(done[TARGET_ONLY])
        yield [generation(domain, way.name, done[way.name], alone) for way in ways]
        print(f"{turn + 1} of {len(order)} prompts", flush=True)


def tokens_of(rounds: Sequence[Round]) -> list[int]:
    return [token for entry in rounds for token in entry.tokens]


def generation(domain: str, way: str, rounds: Sequence[Round], alone: list[int]) -> Generation:
    later = rounds[1:]
    return Generation(
        domain,
        way,
        tokens=sum(len(entry.tokens) for entry in later),
        rounds=len(later),
        drafted=sum(entry.drafted for entry in later),
        accepted=sum(entry.accepted for entry in later),
        looked_up=sum(entry.looked_up for entry in later),
        looked_up_accepted=sum(min(entry.looked_up, entry.accepted) for entry in later),
        paused=sum(entry.is_paused for entry in later),
        seconds=sum(entry.seconds - entry.prefill_seconds for entry in later),
        is_equal=tokens_of(rounds) == alone,
    )


if __name__ == "__main__":
    main()
