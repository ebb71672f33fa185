"""The head that `--k auto` chooses for a pair."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines import load_engine
from engines.bundle.read import Manifest, Role
from vocabtrim_export.calibration import TokenCounts
from vocabtrim_export.calibration.counting import CalibrationInput
from vocabtrim_export.head_choice.choose import SLOTS, Choice, choose
from vocabtrim_export.head_choice.steps import measure_steps
from vocabtrim_export.head_choice.texts import held_out_prompts, replayed_texts
from vocabtrim_export.pair_bundles import PairWriter, always_kept, select
from vocabtrim_export.progress import Progress
from vocabtrim_export.selection import kept_order
from vocabtrim_export.settings import ExportSettings, slots_refused
from vocabtrim_export.sources.runtime_tokenizer import runtime_tokenizer
from vocabtrim_export.sources.source import Source


def choose_head(
    places: Mapping[Role, Path],
    writer: PairWriter,
    sources: Mapping[Role, Source],
    data: CalibrationInput,
    counts: TokenCounts,
    available: NDArray[np.int64],
    settings: ExportSettings,
    progress: Progress,
) -> tuple[Choice, dict[Role, Manifest]]:
    """Write the pair with the full head, run its engines on held-out prompts, and choose.

    Args:
        places: The empty directories of both bundles. The target's stays filled, since no K changes it; the drafter's
            does where the full head is chosen.
        writer: Writes the bundles.
        sources: The loaded models by role.
        data: The calibration data, a corpus.
        counts: The token counts.
        available: int64[n], the ids that the drafter may propose.
        settings: The settings of the export.
        progress: Called with (task, done, total).

    Returns:
        The choice, and the manifests of the directories that stay filled.
    """
    if data.counts:  # `check_auto` says it before the long work
        raise ValueError("token counts hold no prompts to replay")
    drafter, target = sources["drafter"], sources["target"]
    tokenizer = runtime_tokenizer(target.tokenizer)
    prompts = held_out_prompts(data, tokenizer, target.vocab_size, settings.calibration)
    order, _ = kept_order(counts, always_kept(sources), drafter.vocab_size, available)
    manifests = writer.write(places, select(counts, sources, len(order), available), 0)
    hidden = drafter.model.get_output_embeddings().weight.shape[1]
    with load_engine(places["target"]) as verifier, load_engine(places["drafter"], "cpu", verifier) as proposer:
        texts = replayed_texts(prompts, verifier, proposer, lambda done, total: progress("replay", done, total))
        longest = max(texts, key=lambda text: len(text.prompt) + len(text.tokens))
        times = measure_steps(verifier, proposer, hidden, [*longest.prompt, *longest.tokens.tolist()])
    choice = choose(texts, order, times, manifests["drafter"].head_rows, _slots_to_try(settings))
    if choice.best != choice.full:
        shutil.rmtree(places["drafter"])
        places["drafter"].mkdir()
        del manifests["drafter"]
    return choice, manifests


def _slots_to_try(settings: ExportSettings) -> tuple[int, ...]:
    if settings.slots is not None:
        return (settings.slots,)
    return (0,) if slots_refused(settings, "language-model") else (0, SLOTS)
