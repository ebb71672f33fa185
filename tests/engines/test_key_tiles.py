"""Calls are cut where attention's products on the CPU begin to add in another order."""

import pytest

from engines.ort.key_tiles import KeyTiles


@pytest.mark.parametrize(
    ("head_dim", "kibibytes", "tiles"),
    [
        (64, 2048, KeyTiles(1024, ())),
        (128, 2048, KeyTiles(512, ())),
        (192, 512, KeyTiles(85, (63,))),
        (256, 512, KeyTiles(64, ())),  # its tiles are too narrow to be split
        (256, 1024, KeyTiles(128, (63,))),
        (512, 1024, KeyTiles(64, (31,))),
        (512, 2048, KeyTiles(128, (31, 63))),
        (256, 0, KeyTiles(1, ())),
    ],
)
def test_cuts_follow_the_size_of_the_cache(head_dim, kibibytes, tiles, monkeypatch):
    """Logits were equal bit for bit in steps of 1 to 200 tokens with these, and without the cuts they were not."""
    monkeypatch.setattr("os.sysconf", lambda name: kibibytes << 10)
    assert KeyTiles.of(head_dim) == tiles


def test_a_system_that_does_not_tell_its_cache_has_no_cuts(monkeypatch):
    def sysconf(name):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("os.sysconf", sysconf)
    assert KeyTiles.of(256).cuts == ()


@pytest.mark.parametrize(
    ("begin", "length", "parts"),
    [
        (0, 63, [63]),
        (0, 64, [63, 1]),
        (63, 80, [80]),  # across the end of a tile
        (60, 200, [3, 128, 69]),
        (191, 1, [1]),
        (190, 2, [1, 1]),
    ],
)
def test_no_call_crosses_a_cut(begin, length, parts):
    assert [*KeyTiles(128, (63,)).parts(begin, length)] == parts


def test_without_cuts_a_feed_is_one_call():
    assert [*KeyTiles(1, ()).parts(7, 256)] == [256]


def test_a_tile_may_have_several_cuts():
    assert [*KeyTiles(128, (31, 63)).parts(0, 200)] == [31, 32, 96, 32, 9]
