"""Calibration by a real server, `vocabtrim serve`: its generations are counted exactly, and its faults are one line."""

import itertools
import json
import shutil
import socket
import socketserver
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from engines.errors import VocabtrimError
from runtime import SamplingParams, SpeculativeDecoder
from vocabtrim_export.calibration import counter
from vocabtrim_export.calibration import endpoint as endpoints
from vocabtrim_export.calibration.counting import CalibrationSettings, calibrate_models
from vocabtrim_export.sources.source import load_tokenizer

helper = pytest.importorskip("tests.serving")

SERVED = {"calibration_endpoint": "http://u", "calibration_model": "m"}
PROMPTS = [f"the quick brown fox {number} jumps" for number in range(12)]


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("llama")


@pytest.fixture(scope="module")
def server(pair):
    """Two workers in a thread of this process."""
    with helper.serving(replace(pair, drafter=None), workers=2) as served:
        yield f"{served.url}/v1"


@pytest.fixture
def count(server, model, tmp_path, monkeypatch):
    """count(…) → what `calibrate` counts of the server's generations."""
    monkeypatch.setenv(endpoints.KEY_VARIABLE, helper.KEY)
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))

    def run(url=server, name="tiny", target=model, output="counts", **settings):
        settings = CalibrationSettings(
            (tmp_path / "prompts.jsonl",), calibration_endpoint=url, calibration_model=name, **settings
        )
        return calibrate_models(None, str(target), tmp_path / f"{output}.safetensors", settings)

    return run


def test_counts_are_those_of_what_the_engine_generates(count, pair, model):
    counts = count(temperature=0.0, calibration_tokens=10**6)
    tokenizer, ids = load_tokenizer(str(model)), []
    with SpeculativeDecoder.load(pair.target) as decoder:
        for prompt in PROMPTS:
            answer = decoder.generate(
                [{"role": "user", "content": prompt}], max_new_tokens=128, sampling=SamplingParams(temperature=0)
            )
            is_ended = answer.finish_reason == "stop"
            text = answer.text if is_ended else answer.text.rstrip("\ufffd")  # the limit may cut a character
            ids += tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += [tokenizer.eos_token_id] * is_ended
    assert (counts.counts + counts.held_out).tolist() == np.bincount(ids, minlength=counts.full_vocab).tolist()


@contextmanager
def between(server, fault):
    """The address of a proxy of the server. fault: (connection's number, answer) → what the client gets, or None."""
    host, port = server.removeprefix("http://").removesuffix("/v1").split(":")
    numbers = itertools.count()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            number = next(numbers)
            request = self.request.recv(1 << 16)
            while b"Content-Length: " in request and not request.endswith(b"}"):
                request += self.request.recv(1 << 16)
            with socket.create_connection((host, int(port))) as behind:
                behind.sendall(request)
                answer = b"".join(iter(lambda: behind.recv(1 << 16), b""))
            if (data := fault(number, answer)) is None:
                time.sleep(0.6)
            else:
                self.request.sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_address[1]}/v1"
        proxy.shutdown()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda number, answer: answer[: len(answer) // 2] if number % 3 == 1 else answer, None),
        (lambda number, answer: None if number % 5 == 1 else answer, None),
        (
            lambda number, answer: answer if number < 1 else answer[:-9],
            r"failed 3 times .*: the counts so far are kept",
        ),
        (lambda number, answer: answer if number < 1 else None, r"failed 3 times .timed out.: the counts so far"),
    ],
    ids=["cut", "slow", "cut for ever", "slow for ever"],
)
def test_answers_that_are_cut_or_late_are_asked_for_again(count, server, monkeypatch, fault, message):
    whole = count(temperature=0.0, calibration_tokens=300).digest
    monkeypatch.setattr(endpoints, "_ATTEMPTS", 3)
    monkeypatch.setattr(counter, "Endpoint", partial(endpoints.Endpoint, timeout=0.5, wait=0.01, concurrency=1))
    with between(server, fault) as url:
        if message is None:
            assert count(url=url, output="again", temperature=0.0, calibration_tokens=300).digest == whole
        else:
            with pytest.raises(VocabtrimError, match=message):
                count(url=url, output="again", temperature=0.0, calibration_tokens=300)


def test_a_server_that_is_down_or_another_one_is_one_line(count, server, model, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoints, "_ATTEMPTS", 2)
    monkeypatch.setattr(counter, "Endpoint", partial(endpoints.Endpoint, wait=0.01))
    with pytest.raises(VocabtrimError, match="has no model 'other', it serves tiny"):
        count(name="other")
    with pytest.raises(VocabtrimError, match=r"/nowhere/chat/completions refuses the request: 404"):
        count(url=server.replace("/v1", "/nowhere"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(VocabtrimError, match=r"models failed 2 times .*refused"):
        count(url=f"http://127.0.0.1:{port}/v1")
    monkeypatch.setenv(endpoints.KEY_VARIABLE, "wrong")
    with pytest.raises(VocabtrimError, match="models refuses the request: 401"):
        count()
    monkeypatch.setenv(endpoints.KEY_VARIABLE, helper.KEY)
    shutil.copytree(model, tmp_path / "letters")
    words = json.loads((model / "tokenizer.json").read_text())
    words["model"]["merges"] = []
    (tmp_path / "letters" / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(VocabtrimError, match="it serves another model than the one to calibrate for"):
        count(target=tmp_path / "letters", calibration_tokens=10**6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"calibration": ("c.safetensors",), "calibration_endpoint": "u"},
            "--calibration-endpoint says how to count, and",
        ),
        ({"calibration": ("c.safetensors",), "calibration_tokens": 9}, "--calibration-tokens says how to count, and"),
        ({"calibration": ("c.safetensors",), "ray": ""}, "--ray says how to count, and --calibration names counts"),
        ({"calibration": ("c.safetensors",), "template_args": {"a": 1}}, "--template-arg says how to count"),
        ({"calibration_endpoint": "u"}, "belong together"),
        ({"calibration_model": "m"}, "belong together"),
        ({"calibration_source": "text", "temperature": 0.5}, "--temperature is for generations"),
        (SERVED | {"calibration_source": "text"}, "--calibration-endpoint lets a server generate, and"),
        (SERVED | {"ray": "head:1"}, "--ray shares the work of this program, and a server generates"),
        (SERVED | {"chat_template": "x"}, "--chat-template has no effect on the server"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings, message):
    with pytest.raises(VocabtrimError, match=message):
        CalibrationSettings(**settings)


def test_models_that_would_be_ignored_are_refused(model, tmp_path, count):
    output = tmp_path / "counts.safetensors"
    with pytest.raises(VocabtrimError, match="--drafter would not be used, the target's tokens are counted: leave it"):
        calibrate_models("nowhere", str(model), output, CalibrationSettings())
    counts = count(temperature=0.0, calibration_tokens=20)
    sums = CalibrationSettings((output,))
    total = tmp_path / "sum.safetensors"
    assert calibrate_models(None, None, total, sums).digest == counts.digest
    shutil.copytree(model, tmp_path / "other")
    words = json.loads((model / "tokenizer.json").read_text())
    words["model"]["merges"] = []
    words["model"]["vocab"]["another"] = words["model"]["vocab"].pop(max(words["model"]["vocab"], key=len))
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(VocabtrimError, match="made with another tokenizer than"):
        calibrate_models(None, str(tmp_path / "other"), total, sums)
