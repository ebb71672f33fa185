"""The logits that a TensorRT plan must compute: those of its graph on the CPU."""

from pathlib import Path

import numpy as np

from engines.bundle.graph_io import LOGITS
from engines.numbers import to_float32
from engines.trt.plan_proof import ExpectedLogits, kept_positions
from vocabtrim_export.bundles.writer import BundlePlan
from vocabtrim_export.proof.computed import run_graph
from vocabtrim_export.proof.slots import FilledSlots
from vocabtrim_export.proof.tokens import calls, window_of

_COLUMNS = 512  # columns of the logits, evenly spaced: enough to notice any wrong head


def expected_logits(directory: Path, plan: BundlePlan) -> ExpectedLogits:
    """Run `directory`'s standard graph, which was proven before, on the proof's tokens."""
    window = window_of(plan.source.model, plan.context_length, narrow=False)
    fed = calls(plan.source, plan.context_length, window)
    slots = FilledSlots(directory, plan, gains=(1, 1)) if plan.slots else None
    inputs = [slots.filled] * len(fed.lengths) if slots else None
    logits = to_float32(run_graph(directory, fed, window, slots=inputs).outputs[LOGITS])
    ends = np.cumsum(fed.lengths)
    rows = np.concatenate([np.arange(end - kept_positions(n), end) for end, n in zip(ends, fed.lengths, strict=True)])
    spaced = np.linspace(0, logits.shape[1] - 1, min(_COLUMNS, logits.shape[1])).astype(np.int64)
    in_slots = np.arange(logits.shape[1] - plan.slots, logits.shape[1])
    columns = np.unique(np.concatenate([spaced, logits[rows].argmax(-1), in_slots[:_COLUMNS]]))
    return ExpectedLogits(
        fed.token_ids,
        np.array(fed.lengths, np.int64),
        columns,
        np.ascontiguousarray(logits[np.ix_(rows, columns)]),
        slots.token_ids if slots else np.zeros(0, np.int64),
    )
