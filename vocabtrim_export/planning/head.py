"""The head that `--k auto` chooses for a pair."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines import load_engine
from engines.bundle.read import Manifest, Role
from vocabtrim_export.calibration import TokenCounts
from vocabtrim_export.calibration.counting import CalibrationInput
from vocabtrim_export.lowering.graph_files import Progress
from vocabtrim_export.pair_bundles import always_kept, select, write_bundles
from vocabtrim_export.planning.choose import SLOTS, Choice, choose
from vocabtrim_export.planning.steps import measure_steps
from vocabtrim_export.planning.texts import held_out_prompts, replayed_texts
from vocabtrim_export.selection import kept_order
from vocabtrim_export.settings import ExportSettings, slots_refused
from vocabtrim_export.sources.runtime_tokenizer import runtime_tokenizer
from vocabtrim_export.sources.source import Source


def choose_head(
    places: Mapping[Role, Path],
    sources: Mapping[Role, Source],
    given: CalibrationInput,
    counts: TokenCounts,
    available: NDArray[np.int64],
    settings: ExportSettings,
    progress: Progress,
) -> tuple[Choice, dict[Role, Manifest]]:
    """Write the target, which no K changes, to its place and a full drafter aside, and time and replay them.

    Args:
        places: The empty directories of both bundles.
        sources: The loaded models by role.
        given: What was calibrated on, a corpus.
        counts: The token counts.
        available: int64[n], the ids that the drafter may propose.
        settings: How to export.
        progress: Called with (task, done, total).

    Returns:
        The choice, and the manifest of the bundle that stays: the target's.
    """
    if given.corpus is None:  # `check_auto` says it before the long work
        raise ValueError("token counts hold no prompts to replay")
    drafter, target = sources["drafter"], sources["target"]
    tokenizer = runtime_tokenizer(target.tokenizer)
    prompts = held_out_prompts(given.corpus, tokenizer, target.vocab_size, settings.calibration)
    order, _ = kept_order(counts, always_kept(sources), drafter.vocab_size, available)
    aside = places["drafter"].with_name("full-drafter")
    aside.mkdir()
    full = select(counts, sources, len(order), available)
    written: dict[Role, Path] = {"drafter": aside, "target": places["target"]}
    manifests = write_bundles(written, sources, full, counts, replace(settings, slots=0), progress)
    hidden = drafter.model.get_output_embeddings().weight.shape[1]
    with load_engine(places["target"]) as verifier, load_engine(aside) as proposer:  # each with a cache of its own
        times = measure_steps(verifier, proposer, hidden)
        texts = replayed_texts(prompts, verifier, proposer, lambda done, total: progress("replay", done, total))
    shutil.rmtree(aside)
    slots = (0, SLOTS) if settings.slots is None and not slots_refused(settings, "language-model") else ()
    tried = slots or (settings.slots or 0,)
    return choose(texts, order, times, manifests["drafter"].head_rows, tried), {"target": manifests["target"]}
