"""Amounts of memory, from the files of a system that is made up."""

import os

import pytest

from vocabtrim_export import memory

MACHINE = 64 << 30


@pytest.fixture
def system(tmp_path, monkeypatch):
    """system(name, text): a file of a machine with 64 GiB of memory; it has none at first."""
    files = {name: tmp_path / name for name in ("v2", "v1", "meminfo")}
    monkeypatch.setattr(memory, "_LIMITS", (files["v2"], files["v1"]))
    monkeypatch.setattr(memory, "_NOW", files["meminfo"])
    values = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": MACHINE // 4096}
    monkeypatch.setattr(os, "sysconf", values.__getitem__)
    return lambda name, text: files[name].write_text(text)


def test_a_machine_without_limits_has_all_its_memory(system):
    assert memory.all_memory() == memory.available_memory() == MACHINE
    system("v2", "max\n")
    system("v1", "9223372036854771712\n")
    system("meminfo", f"MemTotal: {MACHINE // 1024} kB\nMemFree: 5 kB\nMemAvailable: 3000000 kB\n")
    assert (memory.all_memory(), memory.available_memory()) == (MACHINE, 3_072_000_000)


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_a_container_has_what_its_limit_leaves(system, name):
    system(name, "2147483648\n")
    assert memory.all_memory() == memory.available_memory() == 2 << 30
    system("meminfo", "MemAvailable: 3000000 kB\n")
    assert memory.available_memory() == 2 << 30
    system("meminfo", "MemAvailable: 1000000 kB\n")
    assert memory.available_memory() == 1_024_000_000
