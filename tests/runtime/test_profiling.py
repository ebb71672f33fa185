import itertools
import json
import os
import sys
import timeit

import numpy as np
import pytest

from engines.errors import VocabtrimError
from runtime.profiling import DRAFTER, LOOP, NO_PROFILER, PHASES, TARGET, ChromeTrace, NvtxProfiler


def one_round(profiler, tokens=4):
    with profiler.span("round"):
        with profiler.span("draft", track=DRAFTER, tokens=tokens):
            pass
        with profiler.span("verify", track=TARGET, tokens=tokens + 1, length=100):
            pass
        with profiler.span("accept"):
            pass
        with profiler.span("rewind"):
            pass


def read(path):
    """The events of a trace that holds what the format asks of it, by their phase letter."""
    document = json.loads(path.read_text())
    assert set(document) <= {"traceEvents", "displayTimeUnit"}
    complete = [event for event in document["traceEvents"] if event["ph"] == "X"]
    metadata = [event for event in document["traceEvents"] if event["ph"] == "M"]
    assert len(complete) + len(metadata) == len(document["traceEvents"])
    for event in complete:
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert {type(event["pid"]), type(event["tid"])} == {int}
        assert all(isinstance(value, int | float) for value in event.get("args", {}).values())
    return complete, metadata


def test_the_trace_is_valid_nested_and_in_order(tmp_path):
    trace = ChromeTrace()
    for tokens in (4, 2):
        one_round(trace, tokens)
    trace.save(tmp_path / "rounds.json")
    spans, metadata = read(tmp_path / "rounds.json")
    assert [span["name"] for span in spans] == ["round", "draft", "verify", "accept", "rewind"] * 2
    begins = [span["ts"] for span in spans]
    assert begins == sorted(begins)
    for outer, *inner in (spans[:5], spans[5:]):
        for before, after in itertools.pairwise(inner):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-6
        assert outer["ts"] <= inner[0]["ts"]
        assert inner[-1]["ts"] + inner[-1]["dur"] <= outer["ts"] + outer["dur"] + 1e-6
    assert [span.get("args") for span in spans[1:3]] == [{"tokens": 4}, {"tokens": 5, "length": 100}]
    names = {event["tid"]: event["args"]["name"] for event in metadata if event["name"] == "thread_name"}
    assert [names[span["tid"]] for span in spans[:5]] == [LOOP, DRAFTER, TARGET, LOOP, LOOP]
    order = {event["tid"]: event["args"]["sort_index"] for event in metadata if event["name"] == "thread_sort_index"}
    assert [names[thread] for thread in sorted(order, key=order.get)] == [LOOP, TARGET, DRAFTER]


def test_a_span_that_fails_is_in_the_trace(tmp_path):
    trace = ChromeTrace()
    with (
        pytest.raises(KeyboardInterrupt),
        trace.span("round"),
        trace.span("verify", track=TARGET, tokens=np.int64(5)),
    ):
        raise KeyboardInterrupt
    trace.save(tmp_path / "rounds.json")
    spans, _ = read(tmp_path / "rounds.json")
    assert [span["name"] for span in spans] == ["round", "verify"]
    assert spans[1]["args"] == {"tokens": 5}


def test_an_empty_trace_is_a_trace(tmp_path):
    ChromeTrace().save(tmp_path / "rounds.json")
    assert read(tmp_path / "rounds.json")[0] == []


def test_a_trace_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path, trace = tmp_path / "rounds.json", ChromeTrace()
    trace.save(path)
    before = path.read_text()
    one_round(trace)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            trace.save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == before
    with pytest.raises(FileNotFoundError):
        trace.save(tmp_path / "nowhere" / "rounds.json")
    assert list(tmp_path.iterdir()) == [path]
    trace.save(path)
    assert path.read_text() != before


def test_no_profiler_costs_next_to_nothing():
    def noted():
        with NO_PROFILER.span("draft", track=DRAFTER, tokens=4):
            pass

    def bare():
        pass

    def fastest(function):
        return min(timeit.repeat(function, number=20_000, repeat=7)) / 20_000

    assert fastest(noted) - fastest(bare) < 2e-6  # typically 0.25 µs; a busy machine may be slow
    assert NO_PROFILER.span("draft") is NO_PROFILER.span("verify", tokens=1)
    with pytest.raises(RuntimeError), NO_PROFILER.span("draft"):
        raise RuntimeError


class Recorded:
    """NVTX's own domain, with what went through it."""

    def __init__(self, domain, calls):
        self.domain, self.calls = domain, calls

    def get_category_id(self, name):
        return self.domain.get_category_id(name)

    def get_event_attributes(self, **attributes):
        self.domain.get_event_attributes(**attributes)
        return attributes

    def push_range(self, attributes):
        self.domain.push_range(self.domain.get_event_attributes(**attributes))
        self.calls.append(attributes)

    def pop_range(self):
        self.domain.pop_range()
        self.calls.append("pop")


@pytest.fixture
def calls(monkeypatch):
    """Record the ranges that reach the domain "vocabtrim" of the real package, which needs no GPU."""
    nvtx = pytest.importorskip("nvtx")
    found, get_domain = [], nvtx.get_domain
    monkeypatch.setattr(nvtx, "get_domain", lambda name: Recorded(get_domain(name), found.append(name) or found))
    return found


def test_nvtx_ranges_have_domain_category_and_payload(calls):
    one_round(NvtxProfiler())
    domain, *rest = calls
    assert domain == "vocabtrim"
    pushed = [call for call in rest if call != "pop"]
    assert [call["message"] for call in pushed] == ["round", "draft", "verify", "accept", "rewind"]
    assert all(call["category"] == call["message"] for call in pushed)
    assert set(PHASES) >= {call["category"] for call in pushed[1:]}
    assert pushed[0]["payload"] is None
    assert pushed[1]["payload"] == 4
    (record,) = pushed[2]["payload"]
    assert record.dtype.names == ("tokens", "length")
    assert record.tolist() == (5, 100)


def test_nvtx_payload_keeps_fractions(calls):
    with NvtxProfiler().span("accept", share=0.75, count=np.int64(3)):
        pass
    assert calls[1]["payload"][0].tolist() == (0.75, 3)


def test_nvtx_ranges_come_in_pairs_even_when_the_body_fails(calls):
    profiler = NvtxProfiler()
    with pytest.raises(KeyboardInterrupt), profiler.span("round"), profiler.span("verify", track=TARGET):
        raise KeyboardInterrupt
    depth, depths = 0, []
    for call in calls[1:]:
        depth += -1 if call == "pop" else 1
        depths.append(depth)
    assert depths == [1, 2, 1, 0]


def test_without_nvtx_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(VocabtrimError, match=r"^[^\n]*pip install 'vocabtrim-export\[nvtx\]'$"):
        NvtxProfiler()
