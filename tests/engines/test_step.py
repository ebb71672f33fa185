"""A step's own checks."""

import numpy as np
import pytest

from engines.errors import VocabtrimError
from engines.ort.step import HostStep


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_chosen_logit_that_is_no_number_is_one_line(number):
    ids, logits = np.array([[2, 0]]), np.zeros((1, 2, 3), np.float16)
    logits[0, 0, 1] = -np.inf  # a token that cannot be chosen
    step = HostStep(None, None, ids, ids, ids, ids, ids, logits, {})
    step.check_chosen()
    logits[0, 1, 0] = number
    with pytest.raises(VocabtrimError, match=f"logits are {number}: its numbers are beyond what float16 holds"):
        step.check_chosen()
