"""The acceptance graph against the runtime's rule, the paper's in exact arithmetic and transformers' own."""

import functools
import importlib.util
from fractions import Fraction

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import utils as generation

from engines.bundle.vocab_map import VocabMap
from engines.ort_cuda.graphs.acceptance import sampled_acceptance
from engines.trt.library import load_library
from runtime.accept import Accepted, accept_sampled
from vocabtrim_export.trt.build import BuildOptions, build_plan

UNIT = 256  # probabilities and uniforms in the exact tests are multiples of 1 / UNIT: no float rounds


def session(model: ir.Model) -> ort.InferenceSession:
    return ort.InferenceSession(ir.to_proto(model).SerializeToString())


def run(graph: ort.InferenceSession, draft, **inputs) -> Accepted:
    accepted, next_token = graph.run(["accepted", "next_token"], {"draft_ids": np.array([draft], np.int64), **inputs})
    assert accepted.shape == next_token.shape == (1,)
    assert accepted.dtype == next_token.dtype == np.int64
    return Accepted(int(accepted[0]), int(next_token[0]))


class Scripted:
    """Gives the numbers that the runtime's rule asks for, and no others."""

    def __init__(self, numbers):
        self.numbers = [float(number) for number in numbers]

    def random(self):
        return self.numbers.pop(0)


def runtime_rule(draft, p, q, kept, uniforms, count) -> Accepted:
    """accept_sampled with the graph's uniforms, if it accepts `count` tokens as expected."""
    vocab_map = None if kept is None else VocabMap(np.array(kept), p.shape[1])
    rng = Scripted([*uniforms[: min(count + 1, len(draft))], uniforms[-1]])
    found = accept_sampled(draft, list(q), p.__getitem__, vocab_map, rng)
    assert not rng.numbers
    return found


def paper_rule(draft, p, q, kept, uniforms) -> Accepted:
    """Algorithm 1 of Leviathan et al. 2023 by fractions. p, q: exact; kept: the token of each column of q."""
    p = [[Fraction(float(x)) for x in row] for row in p]
    q = [dict(zip(kept, (Fraction(float(x)) for x in row), strict=True)) for row in q]
    u = [Fraction(float(x)) for x in uniforms]
    count = 0
    while count < len(draft):
        token = draft[count]
        q_token = q[count].get(token, Fraction(0))
        ratio = p[count][token] / q_token if q_token else Fraction(p[count][token] > 0)
        if u[count] >= min(Fraction(1), ratio):
            break
        count += 1
    weights = p[count]
    if count < len(draft):
        rest = [max(Fraction(0), x - q[count].get(token, Fraction(0))) for token, x in enumerate(weights)]
        weights = rest if any(rest) else weights
    share, total = Fraction(0), sum(weights)
    for token, weight in enumerate(weights):
        share += weight / total
        if share > u[-1]:
            return Accepted(count, token)
    raise AssertionError("a uniform of 1 or more")


def parts(draw, size):
    """float32[size]: multiples of 1 / UNIT that add up to 1, many of them zero."""
    cuts = draw(st.lists(st.sampled_from([0, UNIT, *range(0, UNIT, 16)]), min_size=size - 1, max_size=size - 1))
    return np.diff([0, *sorted(cuts), UNIT]).astype(np.float32) / UNIT


@st.composite
def rounds(draw):
    vocab, length = draw(st.integers(2, 11)), draw(st.integers(1, 4))
    kept = draw(st.none() | st.sets(st.integers(0, vocab - 1), min_size=1).map(sorted))
    columns = list(range(vocab)) if kept is None else kept
    p = np.stack([parts(draw, vocab) for _ in range(length + 1)])
    q = np.stack([parts(draw, len(columns)) for _ in range(length)])
    if kept is None and draw(st.booleans()):
        q[: draw(st.integers(0, length))] = p[0]
        p[: length + 1] = p[0]
    # never of a zero of q: the runtime refuses what the drafter cannot have proposed
    draft = [draw(st.sampled_from([t for t, share in zip(columns, row, strict=True) if share])) for row in q]
    u = [draw(st.integers(0, UNIT - 1)) / UNIT for _ in range(length + 1)]
    return draft, p, q, kept, np.array(u, np.float32)


@functools.cache
def sampled_session(vocab, kept):
    return session(sampled_acceptance(vocab, None if kept is None else np.array(kept)))


@settings(max_examples=250, deadline=None)
@given(rounds())
def test_sampled_is_the_runtimes_and_the_papers_rule(entry):
    draft, p, q, kept, u = entry
    graph = sampled_session(p.shape[1], None if kept is None else tuple(kept))
    found = run(graph, draft, p=p, q=q, uniforms=u)
    assert found == paper_rule(draft, p, q, kept or range(p.shape[1]), u)
    assert found == runtime_rule(draft, p, q, kept, u, found.count)


def floats(*rows):
    return np.array(rows, np.float32)


ALMOST = np.nextafter(np.float32(1), np.float32(0))


@pytest.mark.parametrize(
    ("p", "q", "kept", "draft", "u", "accepted"),
    [
        pytest.param([[0.5, 0.5], [0, 1]], [[0.5, 0.5]], None, [0], [ALMOST, 0], Accepted(1, 1), id="p is q"),
        # ALMOST · q rounds to q: rejected by rounding alone, and the residual is all zero
        pytest.param(
            [[0, 1e-45, 1 - 1e-7], [1, 0, 0]], [[0, 1e-45, 1 - 1e-7]], None, [1], [ALMOST, 0.5], Accepted(0, 2), id="≈"
        ),
        pytest.param([[0, 0.5, 0.5], [1, 0, 0]], [[0, 1]], [0, 2], [0], [0, 0.4], Accepted(0, 1), id="both are zero"),
        pytest.param([[0.5, 0.5, 0], [0, 0, 1]], [[0, 1]], [0, 2], [0], [ALMOST, 0], Accepted(1, 2), id="q is zero"),
        pytest.param([[0.5, 0.5, 0], [0, 0, 1]], [[1.0]], [2], [1], [ALMOST, 0], Accepted(1, 2), id="not a kept token"),
        pytest.param([[0.25, 0.75], [1, 0]], [[0.5, 0.5]], None, [0], [0.5, 0], Accepted(0, 1), id="u is p / q"),
        pytest.param([[0, 0.25, 0.75], [1, 0, 0]], [[1.0, 0, 0]], None, [0], [0, 0], Accepted(0, 1), id="first point"),
        pytest.param([[1, 0, 0], [0, 0.5, 0.5]], [[1.0]], [0], [0], [0, 0.5], Accepted(1, 2), id="a point on an edge"),
        pytest.param([[1, 0, 0], [0, 1, 0]], [[1.0]], [0], [0], [0, 1], Accepted(1, 1), id="a uniform that became 1"),
    ],
)
def test_sampled_edges(p, q, kept, draft, u, accepted):
    graph = session(sampled_acceptance(len(p[0]), None if kept is None else np.array(kept)))
    assert run(graph, draft, p=floats(*p), q=floats(*q), uniforms=floats(*u)) == accepted


def random_round(rng, vocab, length, kept):
    """draft, p, q, uniforms: sharp distributions that agree in part, p over all tokens and q over `kept`."""
    logits = 4 * rng.standard_normal((length + 1, vocab))
    guess = logits[:-1, kept] + rng.standard_normal((length, len(kept)))
    p, q = (np.exp(x - x.max(1, keepdims=True)) for x in (logits, guess))
    p, q = (p / p.sum(1, keepdims=True)).astype(np.float32), (q / q.sum(1, keepdims=True)).astype(np.float32)
    draft = [int(kept[rng.choice(len(kept), p=row / row.sum(dtype=np.float64))]) for row in q.astype(np.float64)]
    return draft, p, q, rng.random(length + 1, dtype=np.float32)


def transformers_rule(monkeypatch, draft, p, q, kept, uniforms):
    """transformers' own, its random numbers replaced by `uniforms`; and how far its choice is from another one."""
    gaps = []

    def rand_like(ratio):
        u = torch.from_numpy(uniforms[:-1].copy()).reshape(ratio.shape)
        gaps.append(float((u - ratio).abs().min()))
        return u

    def multinomial(weights, num_samples):
        running = weights[0].double().cumsum(0) / weights.double().sum()
        gaps.append(float((running - float(uniforms[-1])).abs().min()))
        return torch.searchsorted(running, torch.tensor([float(uniforms[-1])]).double(), right=True)[None]

    q_wide = np.zeros((len(draft), p.shape[1]), np.float32)
    q_wide[:, kept] = q
    with monkeypatch.context() as patch, np.errstate(divide="ignore"):
        patch.setattr(torch, "rand_like", rand_like)
        patch.setattr(torch, "multinomial", multinomial)
        ids = torch.tensor([draft])
        tokens, count = generation._speculative_sampling(
            ids, torch.from_numpy(np.log(q_wide))[None], len(draft), torch.from_numpy(np.log(p))[None]
        )
    return Accepted(int(count), int(tokens[0, -1])), min(gaps)


@pytest.mark.parametrize("kept_share", [1.0, 0.3])
def test_sampled_is_transformers_own_rule(monkeypatch, kept_share):
    rng = np.random.default_rng(0)
    vocab, compared, counts = 1000, 0, set()
    kept = np.sort(rng.choice(vocab, int(vocab * kept_share), replace=False))
    graph = session(sampled_acceptance(vocab, None if kept_share == 1 else kept))
    for _ in range(150):
        draft, p, q, u = random_round(rng, vocab, 3, kept)
        wanted, gap = transformers_rule(monkeypatch, draft, p, q, kept, u)
        if gap > 1e-5:  # else rounding decides
            assert run(graph, draft, p=p, q=q, uniforms=u) == wanted
            compared += 1
            counts.add(wanted.count)
    assert compared > 130
    assert counts == {0, 1, 2, 3}


@pytest.mark.parametrize(("vocab", "columns"), [(128_256, 32_768), (151_936, 151_936)])
def test_a_large_vocabulary_is_sampled_at_the_right_point(vocab, columns):
    """Sums in float32 draw the token at `u`, or one so near to it that only rounding lies between."""
    rng = np.random.default_rng(0)
    kept = np.sort(rng.choice(vocab, columns, replace=False))
    graph = session(sampled_acceptance(vocab, None if columns == vocab else kept))
    for sharpness in (0.0, 0.5, 4.0):  # 0: flat, the hardest
        p = np.exp(sharpness * rng.standard_normal((2, vocab)))
        p[0, kept[0]] = 0
        p = (p / p.sum(1, keepdims=True)).astype(np.float32)
        q = np.eye(1, columns, dtype=np.float32)
        for u in (0.0, 0.1, 0.5, 0.999, float(ALMOST)):
            found = run(graph, [int(kept[0])], p=p, q=q, uniforms=floats(0.5, u))
            assert found.count == 0
            running = p[0].cumsum(dtype=np.float64)
            running /= running[-1]
            at = found.next_token
            assert p[0, at] > 0
            assert running[at] > u - 1e-5
            assert at == 0 or running[at - 1] < u + 1e-5


@pytest.mark.statistical
def test_the_first_token_follows_p():
    """Pearson's χ² over the tokens that come out first, drafts drawn from q; q's own law would not pass."""
    p = floats([0.3, 0.05, 0.2, 0.0, 0.25, 0.2], [0.5, 0.5, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1])
    kept = np.array([0, 1, 3, 4])
    q = floats([0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25])
    graph, rng, draws = session(sampled_acceptance(6, kept)), np.random.default_rng(0), 12_000
    drafts = np.stack([kept[row.cumsum().searchsorted(rng.random(draws))] for row in q.astype(np.float64)], axis=1)
    first = np.zeros(draws, np.int64)
    for i, u in enumerate(rng.random((draws, 3), dtype=np.float32)):
        found = run(graph, drafts[i], p=p, q=q, uniforms=u)
        first[i] = drafts[i, 0] if found.count else found.next_token

    def chi_square(tokens):
        wanted = draws * p[0][p[0] > 0]
        return float(((np.bincount(tokens, minlength=6)[p[0] > 0] - wanted) ** 2 / wanted).sum())

    assert not (first == 3).any()
    assert chi_square(first) < 23.5  # 4 degrees of freedom: exceeded with probability 1e-4
    assert chi_square(drafts[:, 0]) > 1000


MODELS = {
    "sampled": lambda: sampled_acceptance(1000),
    "sampled_trimmed": lambda: sampled_acceptance(1000, np.arange(0, 1000, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_onnx_finds_the_graphs_whole(name, tmp_path):
    ir.save(MODELS[name](), tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [1, 4])
def test_tensorrt_rtx_builds_the_graphs(name, length, tmp_path):
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT-RTX is not installed")
    ir.save(MODELS[name](), tmp_path / "model.onnx")
    sizes = {"draft_length": length, "verified": length + 1}
    built = build_plan(load_library("rtx"), tmp_path / "model.onnx", tmp_path / "plan", [sizes], BuildOptions(("8.6",)))
    assert built.size > 10_000
