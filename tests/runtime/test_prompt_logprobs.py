"""The log-probabilities of a text that is there already."""

import numpy as np
import pytest

from engines.errors import VocabtrimError
from runtime import SpeculativeDecoder
from tests.runtime.test_loop import plain_greedy

TEXT = [5, 9, 40, 7, 7, 12, 3, 30, 11]


@pytest.mark.parametrize("most", [2, 4, 8, 256])
def test_each_token_has_the_models_own(make_target, make_drafter, most):
    target = make_target()
    target.max_keep = most  # the most positions of a call
    decoder = SpeculativeDecoder(target, make_drafter())
    decoder.generate([5, 9, 8], max_new_tokens=5)
    target.fed.clear()
    scores = decoder.prompt_logprobs(TEXT, top=2)
    assert target.fed == [min(most, 8 - begin) for begin in range(0, 8, most)]
    for index, entry in enumerate(scores, 1):
        row = target.logits(TEXT[:index]).astype(np.float64)
        expected = row - np.log(np.exp(row).sum())
        assert entry.token_id == TEXT[index]
        assert entry.logprob == pytest.approx(expected[TEXT[index]], abs=1e-5)
        assert [token for token, _ in entry.top] == np.argsort(-expected)[:2].tolist()
    assert len(scores) == len(TEXT) - 1
    target.fed.clear()
    assert list(decoder.generate(TEXT, max_new_tokens=9).token_ids) == plain_greedy(target, TEXT, 9)
    assert target.fed[0] == 1  # the text is not read again


def test_a_text_of_one_token_has_none_and_one_that_does_not_fit_is_refused(make_target):
    decoder = SpeculativeDecoder(make_target())
    assert decoder.prompt_logprobs([5]) == ()
    assert decoder.generate([5], max_new_tokens=3).stats.cached == 0
    for text in ([], [5] * 128, [48]):
        with pytest.raises(VocabtrimError, match="the prompt"):
            decoder.prompt_logprobs(text)
