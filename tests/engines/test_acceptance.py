"""`Acceptance` takes the decisions of the draft/verify loop on real engines, and says what a device lacks."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from engines.errors import VocabtrimError
from engines.ort_cuda.graphs.acceptance import greedy_acceptance, sampled_acceptance
from engines.ort_cuda.graphs.session import Acceptance
from runtime import SamplingParams, SpeculativeDecoder, rules
from runtime.accept import Accepted, accept_greedy, accept_sampled

VOCAB = 448
PROMPTS = [[5, 17, 200, 33], list(range(40, 70)), [7]]


def to_bytes(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("needs an NVIDIA GPU and onnxruntime-gpu")
    return request.param


@pytest.fixture(scope="module")
def decoder(request):
    export = request.getfixturevalue("export_pair")
    directory = request.getfixturevalue("random_model")("llama")
    pair = export(directory, quantize_drafter="int4")
    with SpeculativeDecoder.load(pair.target, pair.drafter) as opened:
        yield opened


class Recorder:
    """The numbers that the rule took from the generator."""

    def __init__(self, rng):
        self.rng, self.numbers = rng, []

    def random(self):
        self.numbers.append(self.rng.random())
        return self.numbers[-1]


def test_greedy_decisions_are_the_loops(decoder, device, monkeypatch):
    graph, counts = Acceptance(to_bytes(greedy_acceptance()), device), []

    def compare(draft, verified):
        wanted = accept_greedy(draft, verified)
        if draft:
            found = graph(draft_ids=np.array([draft]), token_ids=verified[None])
            assert Accepted(int(found.accepted[0]), int(found.next_token[0])) == wanted
            counts.append(wanted.count)
        return wanted

    monkeypatch.setattr(rules, "accept_greedy", compare)
    for prompt in PROMPTS:
        decoder.generate(prompt, max_new_tokens=40)
    assert {0, 1, 2, 3} <= set(counts)


def test_sampled_decisions_are_the_loops(decoder, device, monkeypatch):
    kept = decoder.drafter.vocab_map.kept_token_ids
    graph, counts = Acceptance(to_bytes(sampled_acceptance(VOCAB, kept)), device), []

    def compare(draft, q, p, vocab_map, rng):
        recorder = Recorder(rng)
        wanted = accept_sampled(draft, q, p, vocab_map, recorder)
        if draft:
            uniforms = np.full(len(draft) + 1, 0.5, np.float32)  # those after a rejection are nobody's
            uniforms[: len(recorder.numbers) - 1] = recorder.numbers[:-1]
            uniforms[-1] = recorder.numbers[-1]
            rows = np.stack([p(i) for i in range(len(draft) + 1)])
            found = graph(draft_ids=np.array([draft]), p=rows, q=np.stack(q), uniforms=uniforms)
            assert Accepted(int(found.accepted[0]), int(found.next_token[0])) == wanted
            counts.append(wanted.count)
        return wanted

    monkeypatch.setattr(rules, "accept_sampled", compare)
    for seed, prompt in enumerate(PROMPTS):
        sampling = SamplingParams(temperature=1.0, top_p=0.95, seed=seed)
        decoder.generate(prompt, max_new_tokens=40, sampling=sampling)
    assert {0, 1, 2, 4} <= set(counts)


def test_values_on_the_device_are_read_where_they_are(device):
    graph = Acceptance(to_bytes(sampled_acceptance(3)), device)
    p, q = np.array([[0, 1, 0], [0, 0, 1]], np.float32), np.array([[0.5, 0.5, 0]], np.float32)
    there = {"p": ort.OrtValue.ortvalue_from_numpy(p, device), "q": ort.OrtValue.ortvalue_from_numpy(q, device)}
    for token, wanted in ((0, (0, 1)), (1, (1, 2))):
        found = graph(draft_ids=np.array([[token]]), uniforms=np.array([0.9, 0.9], np.float32), **there)
        assert (found.accepted.tolist(), found.next_token.tolist()) == ([wanted[0]], [wanted[1]])


def test_a_file_is_as_good_as_its_bytes(tmp_path):
    ir.save(greedy_acceptance(), tmp_path / "accept.onnx")
    found = Acceptance(tmp_path / "accept.onnx")(draft_ids=np.array([[3]]), token_ids=np.array([[3, 8]]))
    assert (found.accepted.tolist(), found.next_token.tolist()) == ([1], [8])


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "accept.onnx").write_bytes(b"no graph")
    with pytest.raises(VocabtrimError, match=r"cannot open .*accept\.onnx on cpu: [^\n]+$"):
        Acceptance(tmp_path / "accept.onnx")
    with pytest.raises(VocabtrimError, match="unknown device 'tpu'"):
        Acceptance(tmp_path / "accept.onnx", "tpu")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(VocabtrimError, match=r"CUDA[^\n]*pip install '"):
        Acceptance(tmp_path / "accept.onnx", "cuda")


def test_cuda_that_does_not_start_is_said(monkeypatch):
    """ONNX Runtime goes on with the CPU then, and only logs it."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    session = ort.InferenceSession
    monkeypatch.setattr(
        ort, "InferenceSession", lambda graph, options, **_: session(graph, options, ["CPUExecutionProvider"])
    )
    with pytest.raises(VocabtrimError, match=r"CUDA[^\n]*pip install '"):
        Acceptance(to_bytes(greedy_acceptance()), "cuda")
