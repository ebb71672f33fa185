import json

import pytest

from engines.errors import VocabtrimError
from runtime.measure.sweep import SweepSettings, at_context, sweep

PROMPTS = [[3, 4], [5, 6, 7], [8]]


def test_every_combination_is_measured_against_the_target_at_its_context(make_target, make_drafter):
    target, drafters = make_target(), {"few": make_drafter(range(2, 24)), "full": make_drafter(noise=0.3)}
    settings = SweepSettings((2, 1), (8, 40), 12, 2)
    steps = []
    report = sweep(target, drafters, PROMPTS, settings, bandwidth=1e9, progress=lambda *n: steps.append(n))
    names = [("target_only", 0), ("few", 1), ("few", 2), ("full", 1), ("full", 2)]
    expected = [(name, length, context) for context in (8, 40) for name, length in names]
    assert [(row.drafter, row.draft_length, row.context) for row in report.rows] == expected
    assert steps[-1] == (60, 60)
    assert report.lossless
    by = {(row.drafter, row.draft_length, row.context): row.report for row in report.rows}
    assert by["target_only", 0, 8].bytes_per_step == 1000 + 8 * (8 + 6)
    assert by["few", 2, 40].bytes_per_step == 200 + 8 * (40 + 6)
    assert by["few", 2, 8].speedup == by["few", 2, 8].tokens_per_second / by["target_only", 0, 8].tokens_per_second
    assert {row.drafter: row.head_rows for row in report.rows} == {"target_only": 48, "few": 22, "full": 48}
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["kind"], data["settings"]["draft_lengths"], len(data["rows"])) == ("sweep", [1, 2], 10)


def test_a_forced_sweep_accepts_the_same_in_each_row_or_all(make_target, make_drafter):
    target = make_target(eos_bias=100.0)  # alone it would end at once
    settings = SweepSettings((1, 3), (), 25, 1, "all")
    report = sweep(target, {"d": make_drafter(noise=5.0)}, PROMPTS, settings, bandwidth=1e9)
    assert [row.report.block_efficiency for row in report.rows] == [1, 2, 4]
    assert report.lossless is None
    with pytest.raises(VocabtrimError, match="--force-accepted is 2 and a round drafts 1 tokens"):
        sweep(make_target(), {"d": make_drafter()}, PROMPTS, SweepSettings((1, 3), force_accepted=2))


def test_a_prompt_is_repeated_or_cut_to_a_context():
    assert at_context([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert at_context([1, 2, 3], 2) == [1, 2]


@pytest.mark.parametrize("contexts", [(100,), (0,)])
def test_a_context_that_does_not_fit_is_refused(make_target, make_drafter, contexts):
    with pytest.raises(VocabtrimError, match=rf"context of {contexts[0]} tokens and 40 new ones do not fit in the 128"):
        sweep(make_target(), {"d": make_drafter()}, PROMPTS, SweepSettings(contexts=contexts, max_new_tokens=40))


def test_a_sweep_of_nothing_is_refused(make_target):
    for prompts, settings in ([], SweepSettings()), (PROMPTS, SweepSettings(repeats=0)):
        with pytest.raises(VocabtrimError, match="at least one prompt"):
            sweep(make_target(), {}, prompts, settings)
