"""The law of what speculation gives, computed exactly by following every branch of the real code, is the target's."""

from collections import defaultdict
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import runtime.accept
import runtime.rules
from engines.bundle.head_rows import HeadRows
from engines.bundle.vocab_map import VocabMap
from engines.errors import VocabtrimError
from engines.sampling_params import SamplingParams
from engines.slots import Slots
from runtime.accept import accept_sampled
from runtime.adaptive_length import AdaptiveLength
from runtime.lookup_length import LookupLength
from runtime.loop import decode_rounds
from runtime.round_costs import GivenCosts
from runtime.sampling import distribution, sample
from tests.runtime.conftest import FakeEngine


class Enumeration:
    """Runs code once for each way that its random choices may go. `weight`: the probability of the way being taken.

    Stands in for a Generator: a uniform number is compared once, as `number * q >= p`, which is the choice.
    """

    def __init__(self):
        self.path: list[tuple[int, int]] = []  # at each choice of this way: the option taken, and how many there are
        self.depth, self.weight = 0, 1.0

    def ways(self):
        while True:
            self.depth, self.weight = 0, 1.0
            yield self
            while self.path and self.path[-1][0] == self.path[-1][1] - 1:
                self.path.pop()
            if not self.path:
                return
            option, options = self.path[-1]
            self.path[-1] = option + 1, options

    def choose(self, weights) -> int:
        """An index of a positive weight, of those in turn."""
        possible = [index for index, weight in enumerate(weights) if weight > 0]
        if self.depth == len(self.path):
            self.path.append((0, len(possible)))
        index = possible[self.path[self.depth][0]]
        self.depth += 1
        self.weight *= float(weights[index]) / float(np.sum(weights, dtype=np.float64))
        return index

    def random(self):
        return Uniform(self)


class Uniform:
    def __init__(self, enumeration, factor=1.0):
        self.enumeration, self.factor = enumeration, factor

    def __mul__(self, factor):
        return Uniform(self.enumeration, float(factor))

    def __ge__(self, limit):
        below = min(1.0, float(limit) / self.factor)
        return bool(self.enumeration.choose([below, 1 - below]))


def every_way():
    """An `Enumeration` for each way that the rule, and a loop around it, may go."""
    for way in Enumeration().ways():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np.random, "default_rng", lambda seed, way=way: way)
            for module in (runtime.accept, runtime.rules):
                patch.setattr(module, "sample", lambda weights, rng: rng.choose(weights))
            yield way


def normal(weights):
    return (weights / weights.sum()).astype(np.float32)


def random_law(rng, size, zeros):
    """Some entries zero, sometimes all but one."""
    weights = np.exp(rng.choice([0.1, 1.0, 4.0]) * rng.standard_normal(size)) * (rng.random(size) >= zeros)
    weights[rng.integers(size)] += 0.1
    return normal(weights)


MAPS = {"full": None, "some": [0, 2], "one": [1], "all": [0, 1, 2]}


def markov(seed, kept, zeros, ties):
    """p: by the last token, its next one's law. q: the same over the rows of a drafter that keeps `kept`."""
    rng = np.random.default_rng(seed)
    p = np.stack([random_law(rng, 3, zeros) for _ in range(3)])
    rows = [0, 1, 2] if kept is None else kept
    if ties:  # the drafter is right about what it keeps: p equals q, or is a multiple of it
        inside = p[:, rows] + (p[:, rows].sum(axis=1, keepdims=True) == 0)
        return p, np.stack([normal(row) for row in inside])
    return p, np.stack([random_law(rng, len(rows), zeros) for _ in range(3)])


def chain(p, first, length):
    """The law of `length` tokens after `first`."""
    law = {}
    for tokens in product(range(3), repeat=length):
        steps = zip((first, *tokens), tokens, strict=False)
        law[tokens] = float(np.prod([float(p[before, after]) for before, after in steps]))
    return law


def total_variation(law, expected):
    return 0.5 * sum(abs(law.get(key, 0.0) - expected.get(key, 0.0)) for key in {*law, *expected})


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    draft_length=st.integers(1, 5),
    kept=st.sampled_from(list(MAPS)),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
    ties=st.booleans(),
    looked_up=st.lists(st.integers(0, 2), max_size=2),
)
def test_a_block_followed_by_the_targets_chain_is_the_targets_chain(seed, draft_length, kept, zeros, ties, looked_up):
    """Total variation of γ + 1 tokens. zeros = 1: every law is one-hot, of p and q on different tokens mostly.

    looked_up: what the draft begins with, whatever the drafter keeps.
    """
    p, q = markov(seed, MAPS[kept], zeros, ties)
    vocab_map = MAPS[kept] and VocabMap.from_ids(MAPS[kept], 3)
    law = defaultdict(float)
    for way in every_way():
        draft = looked_up[:draft_length]
        at = [0, *draft]
        for _ in range(draft_length - len(draft)):
            row = way.choose(q[at[-1]])
            draft.append(MAPS[kept][row] if vocab_map else row)
            at.append(draft[-1])
        laws = [None if i < len(looked_up) else q[last] for i, last in enumerate(at)]
        accepted = accept_sampled(draft, laws, lambda i, at=at: p[at[i]], vocab_map, way)
        block = (*draft[: accepted.count], accepted.next_token)
        for rest, chance in chain(p, block[-1], draft_length + 1 - len(block)).items():
            law[block + rest] += way.weight * chance
    assert total_variation(law, chain(p, 0, draft_length + 1)) < 1e-6


def bare(engine, logits_by_last, kept):
    """`engine`, one that costs nothing, with `logits_by_last` of the last token as its logits."""
    columns = slice(None) if kept is None else kept
    engine.logits = lambda prefix: logits_by_last[prefix[-1]][columns]
    return engine


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    draft_length=st.integers(1, 3),
    kept=st.sampled_from(list(MAPS)),
    params=st.sampled_from([SamplingParams(1.0), SamplingParams(0.5, top_k=2), SamplingParams(2.0, top_p=0.8)]),
)
def test_the_law_of_whole_generations_is_the_targets(make_target, make_drafter, seed, draft_length, kept, params):
    """Through the loop: rounds, caches, an EOS (token 1) anywhere in a block, a last round that is cut short."""
    rng = np.random.default_rng(seed)
    mine, its = (2 * rng.standard_normal((3, 3)).astype(np.float32) for _ in range(2))
    target = bare(make_target(rows=3), mine, None)
    drafter = bare(make_drafter(MAPS[kept], rows=3), its, MAPS[kept])
    law, expected = defaultdict(float), defaultdict(float)
    for way in every_way():
        rounds = decode_rounds(target, drafter, [0], max_new_tokens=4, draft_length=draft_length, sampling=params)
        tokens = tuple(token for entry in rounds for token in entry.tokens)
        law[tokens] += way.weight
    p = distribution(mine, params)
    for tokens, chance in chain(p, 0, 4).items():
        end = tokens.index(1) + 1 if 1 in tokens else 4
        expected[tokens[:end]] += chance
    assert total_variation(law, expected) < 1e-6


class SlottedDrafter(FakeEngine):
    """Keeps `kept` of three tokens, and has slots for the others."""

    def __init__(self, drafter, logits_by_last, rows, count):
        super().__init__(drafter.manifest, drafter.vocab_map)
        self.logits_by_last = logits_by_last
        self.slots = Slots(drafter.vocab_map, rows, (4, count), np.dtype(np.float32))

    @property
    def head_tokens(self):
        return self.slots

    def remember(self, token_ids):
        self.slots.see(token_ids)

    def rewind(self, length):
        super().rewind(length)
        if length == 0:
            self.slots.clear()

    def logits(self, prefix):
        tokens = self.slots.kept_token_ids
        return np.where(tokens >= 0, self.logits_by_last[prefix[-1]][tokens], np.float32(-np.inf))


@pytest.fixture(scope="session")
def rows_outside(tmp_path_factory):
    """rows_outside(kept) → the file of rows of the others."""

    def make(kept):
        path = tmp_path_factory.mktemp("rows") / "rows.safetensors"
        lost = np.setdiff1d(np.arange(3), kept)
        save_file({"token_ids": lost, "weight": np.zeros((len(lost), 4), np.float32)}, path)
        return HeadRows(path, VocabMap.from_ids(kept, 3), "none")

    return make


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    draft_length=st.integers(1, 3),
    kept=st.sampled_from([[0], [2], [1, 2]]),
    count=st.integers(1, 2),
    params=st.sampled_from([SamplingParams(1.0), SamplingParams(0.5, top_k=2), SamplingParams(2.0, top_p=0.8)]),
)
def test_the_law_with_slots_is_the_targets(
    make_target, make_drafter, rows_outside, seed, draft_length, kept, count, params
):
    """The drafter's columns change with the text: q is over those that there were when the token was drafted."""
    rng = np.random.default_rng(seed)
    mine, its = (2 * rng.standard_normal((3, 3)).astype(np.float32) for _ in range(2))
    target = bare(make_target(rows=3), mine, None)
    drafter = SlottedDrafter(make_drafter(kept, rows=3), its, rows_outside(kept), count)
    law, expected = defaultdict(float), defaultdict(float)
    for way in every_way():
        rounds = decode_rounds(target, drafter, [0], max_new_tokens=4, draft_length=draft_length, sampling=params)
        law[tuple(token for entry in rounds for token in entry.tokens)] += way.weight
    p = distribution(mine, params)
    for tokens, chance in chain(p, 0, 4).items():
        end = tokens.index(1) + 1 if 1 in tokens else 4
        expected[tokens[:end]] += chance
    assert total_variation(law, expected) < 1e-6


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kept=st.sampled_from([*MAPS, "no drafter"]),
    prompt=st.sampled_from([[0, 2] * 9, [2, 0, 0] * 6]),
    params=st.sampled_from([SamplingParams(1.0), SamplingParams(1.0, presence_penalty=0.4, frequency_penalty=-0.3)]),
)
def test_the_law_of_adaptive_drafts_and_looked_up_tokens_is_the_targets(
    make_target, make_drafter, seed, kept, prompt, params
):
    """A draft ends where the drafter's own confidence says, and begins with tokens that no distribution gave."""
    rng = np.random.default_rng(seed)
    mine, its = (2 * rng.standard_normal((3, 3)).astype(np.float32) for _ in range(2))
    target = bare(make_target(rows=3), mine, None)
    drafter = bare(make_drafter(MAPS[kept], rows=3), its, MAPS[kept]) if kept in MAPS else None
    law, looked_up = defaultdict(float), 0
    for way in every_way():
        kind = AdaptiveLength if drafter else LookupLength
        length = kind(3, costs=GivenCosts(step=0.4, row=0.02))  # its state is of this way alone
        rounds = list(decode_rounds(target, drafter, prompt, max_new_tokens=4, draft_length=length, sampling=params))
        law[tuple(token for entry in rounds for token in entry.tokens)] += way.weight
        looked_up += sum(entry.looked_up for entry in rounds)
    assert total_variation(law, law_under(mine, prompt, params, 4)) < 1e-6
    assert looked_up > 0


RULES = {
    "penalties": SamplingParams(1.0, repetition_penalty=1.7, presence_penalty=0.4, frequency_penalty=-0.3),
    "bias": SamplingParams(0.8, logit_bias={0: 1.5, 2: -0.5}, repetition_penalty=1.3, min_p=0.2),
    "ngrams": SamplingParams(1.0, no_repeat_ngram_size=2),
    "forbidden": SamplingParams(1.5, suppress_tokens=(2,), min_new_tokens=2),
}


def ruled(row, prompt, output, params):
    """The rules one by one, as their definitions say."""
    row, text = row.copy(), [*prompt, *output]
    for token, bias in params.logit_bias.items():
        row[token] += bias
    for token in set(text):
        penalty = params.repetition_penalty or 1
        row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        row[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty * (token in output)
    size = params.no_repeat_ngram_size or 0
    for token in range(len(row)) if size else ():
        ngrams = {tuple(text[i : i + size]) for i in range(len(text) - size + 1)}
        row[token] = -np.inf if (*text[len(text) + 1 - size :], token) in ngrams else row[token]
    row[list(params.suppress_tokens or ())] = -np.inf
    if len(output) < (params.min_new_tokens or 0):
        row[1] = -np.inf
    return row


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), draft_length=st.integers(1, 3), kept=st.sampled_from(["full", "some"]))
@pytest.mark.parametrize("rules", RULES)
def test_the_law_under_rules_is_that_of_the_target_under_rules(
    make_target, make_drafter, seed, draft_length, kept, rules
):
    """Each position has a law of its own: it depends on the whole text, drafted tokens included."""
    rng, params, prompt, columns = np.random.default_rng(seed), RULES[rules], [0, 2], MAPS[kept]
    mine, its = (2 * rng.standard_normal((3, 3)).astype(np.float32) for _ in range(2))
    target, drafter = bare(make_target(rows=3), mine, None), bare(make_drafter(columns, rows=3), its, columns)
    law = defaultdict(float)
    for way in every_way():
        rounds = decode_rounds(target, drafter, prompt, max_new_tokens=4, draft_length=draft_length, sampling=params)
        law[tuple(token for entry in rounds for token in entry.tokens)] += way.weight
    assert total_variation(law, law_under(mine, prompt, params, 4)) < 1e-6


def law_under(logits_by_last, prompt, params, length):
    """The law of up to `length` tokens after `prompt` under rules and sampling."""
    expected, stack = defaultdict(float), [((), 1.0)]
    while stack:
        output, chance = stack.pop()
        if len(output) == length or 1 in output:
            expected[output] += chance
            continue
        row = ruled(logits_by_last[(*prompt, *output)[-1]], prompt, output, params)
        p = distribution(row[None], params)[0]
        stack += [((*output, token), chance * float(p[token])) for token in range(3) if p[token] > 0]
    return expected


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("draft", "q", "p"),
    [
        ([0], [0.5, 0.5], [NAN, 1.0]),
        ([0], [NAN, 1.0], [0.5, 0.5]),
        ([0], [INF, 1.0], [0.5, 0.5]),
        ([0], [0.5, 0.5], [INF, 0.0]),
        ([0], [0.5, 0.5], [-0.5, 1.5]),
        ([0], [0.0, 1.0], [0.5, 0.5]),  # q cannot have given this token
        ([2], [0.5, 0.5], [0.5, 0.0, 0.5]),  # nor one that it does not keep
        ([0], [0.5, NAN], [0.0, 1.0]),  # found in what is left over
        ([0], [1.0, 0.0], [0.0, INF]),
        ([], [], [NAN, 1.0]),
        ([], [], [0.0, 0.0]),
    ],
)
def test_numbers_that_are_no_probabilities_are_refused(draft, q, p):
    rows = np.array([p, np.full(len(p), 0.5)], np.float32)  # after a draft that is kept, nothing is wrong
    with pytest.raises(VocabtrimError):
        accept_sampled(
            draft, [np.array(q, np.float32)], rows.__getitem__, VocabMap.from_ids([0, 1], 3), np.random.default_rng(0)
        )


def test_weights_that_overflow_are_refused():
    with pytest.raises(VocabtrimError, match="finite"):
        sample(np.array([1.0, INF], np.float32), np.random.default_rng(0))
