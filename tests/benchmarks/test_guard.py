"""benchmarks/guard.py: what it lets pass, what it does not, and that its committed file is what it compares with."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # its modules import one another as scripts do

import guard  # noqa: E402

COMMITTED = {"step": 2.0, "prompt": 10.0}


@pytest.mark.parametrize(
    ("measured", "fallen"),
    [
        ({"step": 2.0, "prompt": 10.0}, []),
        ({"step": 1.81, "prompt": 9.1}, []),
        ({"step": 1.79, "prompt": 10.0}, ["step"]),
        ({"step": 9.0, "prompt": 8.9}, ["prompt"]),
        ({"step": 2.0}, ["prompt"]),
        ({"step": 2.0, "prompt": 10.0, "new": 0.1}, []),
    ],
    ids=["as committed", "within a tenth", "one below", "faster elsewhere", "not measured", "a new one"],
)
def test_what_falls_more_than_a_tenth_is_named(measured, fallen):
    assert guard.fallen_ratios(measured, COMMITTED) == fallen
    assert len(guard.table(measured, COMMITTED).splitlines()) == len(measured)


def test_the_command_ends_by_its_judgement(tmp_path, capsys):
    file, report = tmp_path / "guard.json", {"environment": {"cpu": "this one"}, "ratios": COMMITTED}
    with pytest.raises(SystemExit, match=r"no guard\.json to compare with"):
        guard.conclude(report, file, update=False)
    guard.conclude(report, file, update=True)
    guard.conclude(report, file, update=False)
    slower = report | {"ratios": COMMITTED | {"step": 1.5}}
    with pytest.raises(SystemExit, match="10% below the committed ratio: step"):
        guard.conclude(slower, file, update=False)
    with pytest.raises(SystemExit, match="committed on this one, measured on another"):
        guard.conclude(slower | {"environment": {"cpu": "another"}}, file, update=False)
    assert "-25.0%" in capsys.readouterr().out
