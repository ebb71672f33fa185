"""A feed is cut into calls, and what they give is joined."""

from itertools import product

import numpy as np
import pytest

from engines.ort.calls import plan_calls
from engines.ort.key_tiles import UNCUT, KeyTiles
from engines.outputs import StepOutput, join_outputs

LONGEST = 8


@pytest.mark.parametrize("tiles", [UNCUT, KeyTiles(16, (5, 7))])
def test_calls_are_the_feed_in_order_and_keep_its_last_positions(tiles):
    for begin, count in product(range(20), range(1, 40)):
        ids = np.arange(100, 100 + count)
        rows = np.arange(2 * count, dtype=np.float32).reshape(count, 2)
        for keep in range(1, min(count, LONGEST) + 1):
            calls = plan_calls(ids, keep, begin, LONGEST, tiles, rows)
            np.testing.assert_array_equal(np.concatenate([call.ids for call in calls]), ids)
            np.testing.assert_array_equal(np.concatenate([call.features for call in calls]), rows)
            asked = [position for call in calls for position in call.ids[len(call.ids) - call.keep :]]
            assert asked == ids[-keep:].tolist()
            assert all(1 <= call.predicted <= len(call.ids) <= LONGEST for call in calls)
            assert [call.is_last for call in calls] == [False] * (len(calls) - 1) + [True]
            places = {(begin + int(call.ids[0]) - 100) % tiles.size for call in calls[1:]}
            assert tiles is UNCUT or all(
                (begin + at) % 16 in places for at in range(1, count) if (begin + at) % 16 in {5, 7}
            )
            assert tiles is not UNCUT or calls[-1].keep == keep  # no predictions of an earlier call are copied


def test_a_feed_that_fits_is_one_call_without_copies():
    ids = np.arange(LONGEST)
    (call,) = plan_calls(ids, 3, 5, LONGEST, UNCUT)
    assert np.shares_memory(call.ids, ids)
    assert (call.keep, call.features, call.is_last) == (3, None, True)
    output = StepOutput(ids[:3], lambda: np.zeros((3, 4), np.float32))
    assert join_outputs([output]) is output


@pytest.mark.parametrize(("count", "keep"), [(LONGEST + 1, LONGEST + 1), (20, 12), (3, 4)])
def test_more_kept_positions_than_a_call_holds_are_an_error(count, keep):
    """No call would ever be long enough, and the loop would not end."""
    with pytest.raises(ValueError, match=f"{keep} positions cannot be kept of {count} tokens in calls of 8"):
        plan_calls(np.arange(count), keep, 0, LONGEST, UNCUT)


def test_outputs_of_calls_that_share_buffers_are_joined():
    """Calls of 0, 2 and 1 kept positions write the same arrays, one after the other."""
    token_ids, logits = np.zeros(2, np.int64), np.zeros((2, 3), np.float32)

    def call(number, kept):
        token_ids[:], logits[:] = number, number
        rows = np.full((4, 5), number, np.float32)
        return StepOutput(token_ids[:kept], lambda: logits[:kept], lambda: rows)

    outputs = [call(1, 0).copied(), call(2, 2).copied(), call(3, 1)]
    joined = join_outputs(outputs)
    assert joined.token_ids.tolist() == joined.logits[:, 2].tolist() == [2, 2, 3]
    assert joined.features[:, 0].tolist() == [1] * 4 + [2] * 4 + [3] * 4
    assert join_outputs([outputs[0], outputs[2]]).logits.base is logits  # nothing to join
