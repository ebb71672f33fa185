"""Fixtures for tests that compare whole exports with PyTorch."""

from pathlib import Path

import numpy as np

from engines import load_engine


def check_logits(path: Path, ids: np.ndarray, wanted: np.ndarray, steps: list[tuple[int, int]]) -> None:
    """Feed `ids` to the bundle in `steps` (tokens fed, positions kept) and compare with `wanted`, PyTorch's logits."""
    spread = wanted.std()
    with load_engine(path) as engine:
        columns = slice(None) if engine.vocab_map is None else engine.vocab_map.kept_token_ids
        at = 0
        for fed, keep in steps:
            output = engine.feed(ids[at : at + fed], keep=keep)
            at += fed
            rows = wanted[at - keep : at, columns]
            np.testing.assert_allclose(output.logits, rows, atol=2e-4 * spread, rtol=1e-4)
            best = rows.argmax(-1)
            assert output.token_ids.tolist() == (best if engine.vocab_map is None else columns[best]).tolist()
        engine.rewind(24)  # forgetting moves no data and loses none
        output = engine.feed(ids[24:30], keep=6)
        np.testing.assert_allclose(output.logits, wanted[24:30, columns], atol=2e-4 * spread, rtol=1e-4)
