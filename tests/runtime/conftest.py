"""An engine that costs nothing: its logits are random numbers seeded by the tokens before them."""

from collections.abc import Callable

import numpy as np
import pytest

import runtime.loop
import runtime.measure.timing
from engines.base import ContextFull, Engine
from engines.bundle.read import Manifest
from engines.bundle.vocab_map import VocabMap
from engines.keys_values import KeysValues
from engines.outputs import StepOutput

VOCAB = 48
EOS = 1


def make_manifest(**changes: object) -> Manifest:
    rows = changes.get("head_rows", VOCAB)
    fields = dict(
        role="target",
        source="a fake",
        source_digest="0" * 64,
        architecture="Fake",
        vocab_size=rows,
        head_rows=rows,
        tokenizer="the tokenizer",
        head="head",
        eos_token_ids=(EOS,),
        dtype="fp32",
        quantization="none",
        context_length=128,
        num_layers=1,
        num_kv_heads=1,
        head_dim=8,
        weight_bytes_per_step=1000,
        head_bytes=500,
        kv_bytes_per_token=8,
        inputs=("input_ids",),
        outputs=("logits", "token_ids"),
        files={},
        tool_versions={"fake": "1"},
    )
    return Manifest(**(fields | changes))


def random_numbers(seed, prefix):
    """float32[512]. NumPy reads an array of its own type in a twentieth of the time that the same list takes."""
    return np.random.default_rng(np.array([seed, *prefix], np.uint32)).standard_normal(512, np.float32)


class FakeEngine(Engine):
    """Two of the same `seed` agree; `noise` makes one differ from the other. `eos_bias` raises the EOS logits."""

    def __init__(self, manifest, vocab_map=None, seed=0, noise=0.0, eos_bias=-100.0):
        super().__init__(manifest, vocab_map)
        self.seed, self.noise, self.eos_bias = seed, noise, eos_bias
        self.tokens: list[int] = []
        self.fed: list[int] = []  # tokens of each feed
        self.fails_at: int | None = None
        self.closed = False
        self._outputs: list[np.ndarray] = []

    def feed(self, token_ids, keep=1):
        token_ids = [int(token) for token in token_ids]
        assert 1 <= keep <= min(256, len(token_ids))
        assert all(0 <= token < self.manifest.vocab_size for token in token_ids)
        if self.length + len(token_ids) > self.capacity:
            raise ContextFull
        for array in self._outputs:  # valid until the next feed, not a moment longer
            array.fill(-1 if array.dtype == np.int64 else np.nan)
        self.fed.append(len(token_ids))
        if self.fails_at == len(self.fed):
            raise RuntimeError("the device is gone")
        self.tokens = self.tokens[: self.length] + token_ids
        self.length = len(self.tokens)
        rows = [self.logits(self.tokens[: self.length - keep + 1 + i]) for i in range(keep)]
        logits = np.stack(rows)
        chosen = logits.argmax(axis=1)
        token_ids = chosen if self.head_tokens is None else self.head_tokens.kept_token_ids[chosen]
        self._outputs = [token_ids.astype(np.int64), logits]
        return StepOutput(self._outputs[0], lambda: logits)

    def logits(self, prefix) -> np.ndarray:
        """float32[head_rows] after `prefix`."""
        width = self.manifest.head_rows if self.vocab_map is None else self.vocab_map.full_vocab
        full = 2 * random_numbers(self.seed, prefix)
        if self.noise:
            full += self.noise * random_numbers(self.seed + 1, prefix)
        full[EOS] += self.eos_bias
        return full[:width] if self.vocab_map is None else full[self.vocab_map.kept_token_ids]

    def snapshot(self):
        held = np.array(self.tokens[: self.length], np.int64)
        return KeysValues(self.length, {"past": held[None, None, :, None]})

    def restore(self, copied, length):
        self.rewind(0)
        self.tokens = copied.arrays["past"][0, 0, :length, 0].tolist()
        self.length = length

    def _release(self):
        self.closed = True


def make_drafter(kept=None, noise=1.0, context=128, rows=VOCAB, **changes) -> FakeEngine:
    vocab_map = None if kept is None else VocabMap.from_ids(kept, rows)
    manifest = make_manifest(
        role="drafter",
        vocab_size=rows,
        head_rows=rows if vocab_map is None else len(vocab_map),
        vocab_map=vocab_map and vocab_map.digest,
        coverage=vocab_map and 0.9,
        context_length=context,
        weight_bytes_per_step=200,
        **changes,
    )
    return FakeEngine(manifest, vocab_map, noise=noise)


def make_target(context=128, rows=VOCAB, eos_bias=-100.0, seed=0, **changes) -> FakeEngine:
    return FakeEngine(make_manifest(context_length=context, head_rows=rows, **changes), eos_bias=eos_bias, seed=seed)


@pytest.fixture(scope="session", name="make_target")
def _make_target() -> Callable[..., FakeEngine]:
    return make_target


@pytest.fixture(scope="session", name="make_drafter")
def _make_drafter() -> Callable[..., FakeEngine]:
    return make_drafter


class Clock:
    """Time that only engines, and a microsecond for each look at it, make pass."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        self.seconds += 1e-6
        return self.seconds

    def engine(self, engine, milliseconds):
        """`engine`, each feed of which takes `milliseconds(tokens)`."""
        feed = engine.feed

        def timed(token_ids, keep=1):
            self.seconds += milliseconds(len(token_ids)) / 1e3
            return feed(token_ids, keep)

        engine.feed = timed
        return engine


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (runtime.loop, runtime.measure.timing):
        monkeypatch.setattr(module, "perf_counter", clock)
    return clock
