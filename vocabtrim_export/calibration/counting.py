"""Token counts for an export: read from earlier calibrations, or counted with the right one of the loaded models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import torch

from engines.bundle.chat_template import ChatOptions
from engines.bundle.read import Role
from engines.errors import VocabtrimError
from vocabtrim_export.bundles.output import alone
from vocabtrim_export.calibration import Corpus, Skipped, TokenCounts, builtin_corpus, calibrate, read_corpus
from vocabtrim_export.calibration import Source as CalibrationSource
from vocabtrim_export.sources.source import Source, calibration_model, load_source


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """What to count; the command line's options by the same names.

    calibration: text files and directories, or files of token counts; none: a corpus that comes with Python.
    calibration_source: None takes the target where there is one, else the drafter.
    chat_template, template_args: how prompts are rendered, see `ChatOptions`.
    """

    calibration: tuple[str | Path, ...] = ()
    calibration_source: CalibrationSource | None = None
    calibration_tokens: int = 100_000
    temperature: float = 1.0
    seed: int = 0
    chat_template: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CalibrationInput:
    """What `calibration` holds: earlier counts, or else a corpus to count on."""

    counts: tuple[TokenCounts, ...]
    corpus: Corpus | None


def read_calibration(names: Sequence[str | Path]) -> CalibrationInput:
    """Read all of `names` before any long work begins. Raises `VocabtrimError`."""
    paths = [Path(name) for name in names]
    counted = [path for path in paths if path.suffix == ".safetensors"]
    if counted and len(counted) < len(paths):
        raise VocabtrimError("--calibration takes either text to calibrate on or token counts, not both")
    if counted:
        return CalibrationInput(tuple(TokenCounts.load(path) for path in counted), None)
    return CalibrationInput((), read_corpus(paths) if paths else builtin_corpus())


def count_tokens(
    sources: Mapping[Role, Source],
    given: CalibrationInput,
    settings: CalibrationSettings,
    checkpoint: Path,
    progress: Callable[[int, int], None],
    on_skip: Callable[[Skipped], None],
) -> TokenCounts:
    """The sum of earlier counts, or a calibration that writes `checkpoint` as it goes.

    on_skip: called for each record of the data that is left out.
    """
    if given.corpus is None:
        counts = reduce(add, given.counts)
        if counts.tokenizer_digest not in {source.tokenizer_digest for source in sources.values()}:
            raise VocabtrimError("the token counts were made with another tokenizer than the model's: calibrate again")
        return counts
    how = settings.calibration_source or ("target" if "target" in sources else "drafter")
    role = next(iter(sources)) if how == "text" else how
    if role not in sources:
        raise VocabtrimError(f"--calibration-source {role} needs a --{role} to generate with")
    source = sources[role]
    for skipped in given.corpus.skipped:
        on_skip(skipped)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    run = partial(
        calibrate,
        tokenizer=source.tokenizer,
        corpus=given.corpus,
        source=how,
        max_tokens=settings.calibration_tokens,
        seed=settings.seed,
        temperature=settings.temperature,
        checkpoint=checkpoint,
        progress=progress,
        model_digest=source.digest,
        chat=ChatOptions(settings.chat_template, template_args=settings.template_args),
        on_skip=on_skip,
    )
    if how == "text":
        return run(None)
    with calibration_model(source.model) as model:
        return run(model)


def calibrate_models(
    drafter: str | None,
    target: str | None,
    output: Path,
    settings: CalibrationSettings,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    on_skip: Callable[[Skipped], None] = lambda _skipped: None,
) -> TokenCounts:
    """Load the MODEL that counts and count into the file `output`, which a run that was interrupted goes on from.

    on_skip: called for each record of the data that is left out.
    """
    if drafter is None and target is None:
        raise VocabtrimError("nothing to calibrate: give --target or --drafter")
    if output.suffix != ".safetensors":
        raise VocabtrimError(f"--output {output}: name the file of token counts something.safetensors")
    given = read_calibration(settings.calibration)
    if given.corpus is None:
        counts = reduce(add, given.counts)
        with alone(output):
            counts.save(output)
        return counts
    role: Role = "target" if target and settings.calibration_source != "drafter" else "drafter"
    spec = target if role == "target" else drafter
    if spec is None:
        raise VocabtrimError("--calibration-source drafter needs a --drafter to generate with")
    source = load_source(spec, torch.float32)
    with alone(output):
        return count_tokens({role: source}, given, settings, output, progress, on_skip)
