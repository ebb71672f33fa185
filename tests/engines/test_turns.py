"""Turns go round in the order in which they were asked for, and none is lost."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from engines.errors import VocabtrimError
from engines.exclusive_use import Claim, ExclusiveUse
from engines.turns import Turns


def wait_until(condition):
    done = threading.Event()
    for _ in range(2000):
        if condition():
            return
        done.wait(0.005)
    raise AssertionError("it does not happen")


def assert_free(turns):
    thread = threading.Thread(target=turns.begin, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def turns():
    return Turns()


def test_turns_come_in_the_order_in_which_they_were_asked_for(turns):
    had = []

    def work(name):
        for _ in range(3):
            turns.begin()
            had.append(name)
            turns.end()

    turns.begin()
    with ThreadPoolExecutor(3) as pool:
        for count, name in enumerate("abc", 1):
            pool.submit(work, name)
            wait_until(lambda count=count: len(turns._waiting) == count)
        turns.end()
    assert "".join(had) == "abcabcabc"
    turns.begin()  # free again
    turns.end()


def test_a_turn_that_is_passed_on_comes_back(turns):
    had = []

    def work(name):
        turns.begin()
        had.append(name)
        turns.end()

    turns.begin()
    turns.pass_on()  # nobody waits
    with ThreadPoolExecutor(2) as pool:
        for count, name in enumerate("ab", 1):
            pool.submit(work, name)
            wait_until(lambda count=count: len(turns._waiting) == count)
        turns.pass_on()
        had.append("me")
        turns.end()
    assert had == ["a", "b", "me"]


@pytest.mark.parametrize("comes", [False, True])
def test_who_is_interrupted_while_waiting_holds_up_nobody(turns, comes, monkeypatch):
    """Before the turn comes, and while it comes."""

    class Interrupted:
        def __init__(self):
            self.lock, self.count = threading.Lock(), 0

        def acquire(self):
            self.count += 1
            if self.count == 2:
                if comes:
                    turns.end()
                raise KeyboardInterrupt
            return self.lock.acquire()

        def release(self):
            self.lock.release()

    turns.begin()
    with monkeypatch.context() as patch:
        patch.setattr("engines.turns.Lock", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            turns.begin()
    if not comes:
        turns.end()
    assert_free(turns)


def test_a_claim_that_is_refused_or_fails_gives_its_turn_back(turns):
    uses = [ExclusiveUse(), ExclusiveUse()]
    uses[0].turns = uses[1].turns = turns
    with pytest.raises(RuntimeError, match="a fault"), Claim([uses[0]]):
        raise RuntimeError("a fault")
    uses[0].pass_on()  # it has no turn now
    uses[1].close()
    with pytest.raises(VocabtrimError, match="closed"):
        Claim(uses).__enter__()
    assert not uses[0].running.locked()
    assert_free(turns)
