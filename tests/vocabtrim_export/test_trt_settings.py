from pathlib import Path

import pytest

from engines.bundle.read import Profile
from engines.errors import VocabtrimError
from engines.trt.engine import plan_calls
from vocabtrim_export.trt.settings import TensorRTSettings, cache_slots, dimensions, profiles


def test_defaults_are_sound():
    TensorRTSettings().check()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flavor": "rt"}, "--trt-flavor is 'rt': choose one of auto, none, tensorrt, rtx"),
        ({"compute_capabilities": ("8.6", "sm86")}, "--compute-capability is 'sm86': write it like 8.6"),
        ({"compute_capabilities": ("86",)}, "--compute-capability is '86'"),
        ({"draft_length": -1}, "--draft-length is -1: give 0 to 64"),
        ({"draft_length": 65}, "--draft-length is 65: give 0 to 64"),
        ({"prefill_chunk": 0}, "--prefill-chunk is 0: give 1 to 4096"),
        ({"prefill_chunk": 4097}, "--prefill-chunk is 4097: give 1 to 4096"),
        ({"spans": (512, 0)}, "--span is 0"),
        ({"timing_cache": Path("/")}, "--timing-cache is /, a directory: name a file"),
        ({"draft_length": 0, "unroll": True}, "--unroll-draft needs a --draft-length of 1 or more"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(VocabtrimError) as error:
        TensorRTSettings(**values).check()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values", [{"draft_length": 0}, {"draft_length": 64}, {"prefill_chunk": 1}, {"prefill_chunk": 4096}]
)
def test_limits_are_allowed(values):
    TensorRTSettings(**values).check()


def test_target_verifies_and_drafter_drafts():
    settings = TensorRTSettings(draft_length=4, prefill_chunk=256)
    assert profiles("target", settings, 1000) == (Profile("verify", 5, 5, 1024), Profile("prefill", 256, 1, 1024))
    assert profiles("drafter", settings, 1000) == (Profile("draft", 1, 1, 1024), Profile("prefill", 256, 1, 1024))


def test_shorter_spans_come_first_and_once():
    settings = TensorRTSettings(spans=(1000, 120, 100))
    found = profiles("target", settings, 2000)
    assert [profile.span for profile in found] == [128, 128, 1024, 1024, 2048, 2048]
    assert [profile.phase for profile in found] == ["verify", "prefill"] * 3
    assert [profile.tokens for profile in found if profile.phase == "prefill"] == [128, 256, 256]


def test_without_drafting_the_target_decodes_token_by_token():
    assert profiles("target", TensorRTSettings(draft_length=0), 64)[0] == Profile("verify", 1, 1, 64)


@pytest.mark.parametrize("span", [1000, 1001])
def test_a_span_must_be_shorter_than_the_cache(span):
    with pytest.raises(VocabtrimError, match=f"--span is {span}: give lengths below --max-length, .* 1000"):
        profiles("drafter", TensorRTSettings(spans=(span,)), 1000)


@pytest.mark.parametrize(
    ("length", "draft_length", "slots"), [(1, 0, 64), (60, 4, 64), (61, 4, 128), (1024, 0, 1024), (1024, 4, 1088)]
)
def test_slots_leave_room_for_a_padded_verification(length, draft_length, slots):
    assert cache_slots(length, draft_length) == slots


@pytest.mark.parametrize("length", [1, 59, 60, 61, 127, 128, 500])
@pytest.mark.parametrize("draft_length", [0, 4, 64])
def test_every_token_of_a_full_cache_can_be_fed(length, draft_length):
    """Wherever a feed starts, calls of these profiles take it to the last token that the cache is to hold."""
    found = profiles("target", TensorRTSettings(draft_length=draft_length, prefill_chunk=100), length)
    slots = cache_slots(length, draft_length)
    for start in range(length):
        calls = plan_calls(found, length - start, 1, slots - start)
        assert calls[-1].stop == length - start
        assert all(start + call.start + call.profile.tokens <= slots for call in calls)


def test_dimensions_are_those_of_the_graph():
    assert dimensions(Profile("verify", 5, 4, 128)) == {"sequence_length": 5, "keep": 4, "span": 128}
