"""Several decoders over one pair of loaded weights, and many generations one after the other."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnxruntime
import pytest

from engines import VocabtrimError, load_engine
from engines.load import load_pair
from runtime import SamplingParams, SpeculativeDecoder
from vocabtrim_export.trt.settings import TensorRTSettings

ROOT = Path(__file__).parents[2]
JOBS = [
    ([5 + seed, 6, 7, *range(20, 20 + 9 * seed)], SamplingParams() if seed % 2 else SamplingParams(1.0, seed=seed))
    for seed in range(8)
]


@pytest.fixture(scope="module")
def pair(random_model, export_pair):
    return export_pair(random_model("llama"), max_length=256)


@pytest.fixture
def decoder(pair):
    with SpeculativeDecoder.load(pair.target, pair.drafter, draft_length=4) as decoder:
        yield decoder


def decode(decoder, jobs):
    return [decoder.generate(prompt, max_new_tokens=30, sampling=sampling).token_ids for prompt, sampling in jobs]


def test_decoders_in_threads_give_what_one_alone_gives(decoder):
    """Each of four threads runs all jobs, in an order of its own, three times."""
    wanted = decode(decoder, JOBS)
    forks = [decoder, *(decoder.fork() for _ in range(3))]

    def work(number):
        order = [(number + i) % len(JOBS) for i in range(len(JOBS))] * 3
        return all(decode(forks[number], [JOBS[i]]) == [wanted[i]] for i in order)

    with ThreadPoolExecutor(len(forks)) as pool:
        assert list(pool.map(work, range(len(forks)))) == [True] * len(forks)


def test_forks_read_the_same_weights_and_have_caches_of_their_own(decoder, monkeypatch):
    monkeypatch.delattr(onnxruntime, "InferenceSession")  # nothing is loaded again
    fork = decoder.fork()
    assert decoder.target.cache is decoder.drafter.cache
    assert fork.target.cache is fork.drafter.cache is not decoder.target.cache
    assert fork.tokenizer is decoder.tokenizer
    wanted = decode(fork, JOBS)
    stream = decoder.stream(JOBS[0][0], max_new_tokens=30, sampling=JOBS[0][1])
    tokens = [next(stream).id]
    assert decode(fork, JOBS) == wanted  # between two tokens of the other one
    assert (*tokens, *(token.id for token in stream)) == wanted[0]
    decoder.close()
    assert decode(fork, JOBS) == wanted
    with fork.fork() as another:
        fork.close()
        assert decode(another, JOBS) == wanted


@pytest.mark.parametrize(
    ("broken", "named"), [(("drafter",), "drafter"), (("target", "drafter"), "target"), (("target",), "target")]
)
def test_a_pair_that_loads_at_the_same_time_is_refused_as_one_by_one(pair, tmp_path, broken, named):
    """A byte of weights is changed, which nothing notices but their digest, computed while sessions open."""
    paths = {"target": pair.target, "drafter": pair.drafter}
    for name in broken:
        paths[name] = shutil.copytree(paths[name], tmp_path / name)
        with (paths[name] / "model.onnx.data").open("r+b") as weights:
            weights.seek(1000)
            changed = bytes([weights.read(1)[0] ^ 1])
            weights.seek(1000)
            weights.write(changed)
    with pytest.raises(VocabtrimError, match=rf"{named}/model\.onnx\.data does not match its digest"):
        load_pair(paths["target"], paths["drafter"])


def test_a_drafter_with_a_cache_of_its_own_keeps_one_in_a_fork(pair):
    with load_engine(pair.target) as target, load_engine(pair.drafter) as drafter:
        decoder = SpeculativeDecoder(target, drafter, draft_length=3)
        fork = decoder.fork()
        assert fork.draft_length == 3
        assert len({id(e.cache) for e in (target, drafter, fork.target, fork.drafter)}) == 4
        assert decode(fork, JOBS) == decode(decoder, JOBS)


def test_an_engine_that_cannot_fork_says_so(random_model, export_pair):
    graphs = TensorRTSettings(flavor="none", draft_length=3, prefill_chunk=16)
    path = export_pair(random_model("llama"), trt=graphs, dtype="fp32").target
    with load_engine(path) as engine, pytest.raises(VocabtrimError, match="load the bundle once more"):
        SpeculativeDecoder(engine).fork()


def test_a_short_soak(pair, tmp_path):
    """`benchmarks/soak.py` for a few thousand tokens: its exit code says what it found."""
    report = tmp_path / "soak.json"
    command = [sys.executable, "benchmarks/soak.py", "--target", pair.target, "--drafter", pair.drafter]
    command += ["--tokens", "4000", "--decoders", "2", "--json", report]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["tokens"] >= 4000
    assert min(found["repeats_compared"], found["cancelled"]) > 10
