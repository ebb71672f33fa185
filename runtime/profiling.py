"""Record the spans of each round: as NVTX ranges for Nsight Systems, as a Chrome trace for Perfetto, or not at all.

`with profiler.span("draft", track=DRAFTER, tokens=4): …`. A span's name is its phase, one of `PHASES` or "round"; its
payload is numbers that are known when it begins. "catch_up" is the drafter's reading of what it has not seen yet,
"speculate" drafting and verifying in one go of a GPU.
"""

import importlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import perf_counter_ns
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np

from engines.errors import VocabtrimError

DOMAIN = "vocabtrim"
PHASES = ("prefill", "draft", "catch_up", "verify", "speculate", "accept", "rewind")
LOOP, TARGET, DRAFTER = "loop", "target", "drafter"  # the tracks, in the order that a trace shows them


class Profiler(Protocol):
    """Told when a phase begins and, by leaving the context, when it ends; also where it ends with an exception."""

    def span(self, name: str, track: str = LOOP, **payload: float) -> AbstractContextManager[None]:
        """Record the block as a span. Spans of one track nest.

        Args:
            name: The phase.
            track: The part that is busy: `LOOP`, `TARGET` or `DRAFTER`.
            payload: Numbers that describe it.
        """


class _Nothing:
    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


_NOTHING = _Nothing()  # holds nothing, so that all spans can be this one; half the time of `nullcontext`


class NoProfiler:
    """Notes nothing, in about a quarter of a microsecond a span."""

    __slots__ = ()

    def span(self, name: str, track: str = LOOP, **payload: float) -> AbstractContextManager[None]:  # noqa: ARG002
        return _NOTHING


NO_PROFILER = NoProfiler()


class NvtxProfiler:
    """Pushes and pops NVTX ranges in the domain "vocabtrim", with each phase as a category of its own.

    Where no tool listens, NVTX's calls do nothing.

    Raises:
        VocabtrimError: The package nvtx is not installed.
    """

    def __init__(self) -> None:
        try:
            nvtx = importlib.import_module("nvtx")  # optional, and without types
        except ImportError as error:
            raise VocabtrimError("the package nvtx is missing: pip install 'vocabtrim-export[nvtx]'") from error
        self._domain: Any = nvtx.get_domain(DOMAIN)
        for phase in PHASES:  # registered before anything is timed
            self._domain.get_category_id(phase)

    @contextmanager
    def span(self, name: str, track: str = LOOP, **payload: float) -> Iterator[None]:  # noqa: ARG002
        # a thread's ranges nest by themselves: the track is the phase's
        attributes = self._domain.get_event_attributes(message=name, category=name, payload=_one_value(payload))
        self._domain.push_range(attributes)
        try:
            yield
        finally:
            self._domain.pop_range()


def _one_value(payload: dict[str, float]) -> Any:
    """NVTX takes one value with a range: a number, or a record of several by their names."""
    if len(payload) < 2:
        return next(iter(payload.values()), None)
    fields = [(key, np.float64 if isinstance(value, float) else np.int64) for key, value in payload.items()]
    return np.array([tuple(payload.values())], dtype=fields)


class _Span(NamedTuple):
    """A recorded span; `begin` and `end` are in nanoseconds, by `perf_counter_ns`."""

    name: str
    track: str
    begin: int
    end: int
    payload: dict[str, float]


class ChromeTrace:
    """Keeps all spans in memory, about 300 bytes each, and writes them for Perfetto (ui.perfetto.dev).

    The file is the Trace Event Format's JSON object: a complete event ("X") a span, in microseconds from the start, and
    a thread a track. https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
    """

    def __init__(self) -> None:
        self._start = perf_counter_ns()
        self._spans: list[_Span] = []

    @contextmanager
    def span(self, name: str, track: str = LOOP, **payload: float) -> Iterator[None]:
        begin = perf_counter_ns()
        try:
            yield
        finally:
            self._spans.append(_Span(name, track, begin, perf_counter_ns(), payload))

    def events(self) -> list[dict[str, Any]]:
        """Returns the trace's events: the tracks' names, then the spans as they began, outer ones first."""
        used = {span.track: None for span in self._spans}
        tracks = [track for track in (LOOP, TARGET, DRAFTER) if track in used]
        tracks += [track for track in used if track not in tracks]
        ids = {track: number for number, track in enumerate(tracks, 1)}
        named = [_metadata("process_name", 0, {"name": DOMAIN})]
        for track, number in ids.items():
            named += [_metadata("thread_name", number, {"name": track})]
            named += [_metadata("thread_sort_index", number, {"sort_index": number})]
        spans = sorted(self._spans, key=lambda span: (span.begin, -span.end))
        return named + [self._complete(span, ids[span.track]) for span in spans]

    def save(self, path: Path) -> None:
        """Write the trace, whole or not at all.

        Args:
            path: The JSON file.

        Raises:
            OSError: It cannot be written.
        """
        text = json.dumps({"traceEvents": self.events(), "displayTimeUnit": "ms"}, default=float)  # NumPy's
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.write(text)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    def _complete(self, span: _Span, thread: int) -> dict[str, Any]:
        times = {"ts": (span.begin - self._start) / 1000, "dur": (span.end - span.begin) / 1000}
        event = {"ph": "X", "name": span.name, "cat": span.name, "pid": 1, "tid": thread, **times}
        return event | {"args": span.payload} if span.payload else event


def _metadata(name: str, thread: int, arguments: dict[str, str | int]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": 1, "tid": thread, "args": arguments}
