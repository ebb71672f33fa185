"""A timed engine is its engine, with its calls timed."""

import inspect

from engines.base import Engine
from runtime.measure.timing import TimedEngine, timed_run

TIMED = {"feed", "feed_features", "draft", "speculate"}


def test_every_member_of_an_engine_is_reached_through_a_timed_one(make_target):
    engine = make_target(context=7)
    timed = TimedEngine(engine)
    members = {name for name in dir(engine) if not name.startswith("_")}
    assert {"slots", "text", "head_tokens", "environment", "restart", "check_feed", "device"} | TIMED < members
    for name in members - TIMED:
        assert getattr(timed, name) == getattr(engine, name)
    for name in TIMED:
        parameters = [inspect.signature(getattr(owner, name)).parameters for owner in (TimedEngine, Engine)]
        assert [*parameters[0]] == [*parameters[1]]
    for name in vars(engine):
        setattr(timed, name, name)
        assert getattr(engine, name) == name


def test_a_timed_run_leaves_its_text_with_the_engines(make_target, make_drafter):
    target, drafter = make_target(), make_drafter(noise=0.3)
    run = timed_run(target, drafter, [3, 4], 20, 4)
    assert tuple(target.text) == tuple(drafter.text) == (3, 4, *run.tokens)
    assert [feed.tokens for feed in run.target] == target.fed
    assert [feed.tokens for feed in run.drafter] == drafter.fed
