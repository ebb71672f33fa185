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
    """What to count. The fields are named like the command line's options.

    Attributes:
        calibration: Text files and directories, or files of token counts; empty: a corpus that comes with Python.
        calibration_source: The model that generates, or "text"; None takes the target where there is one, else the
            drafter.
        calibration_tokens: The number of tokens to count.
        temperature: Temperature of sampling; 0 is greedy.
        seed: Seed of the random numbers that tokens are drawn with.
        chat_template: See `ChatOptions`.
        template_args: See `ChatOptions`.
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
    """The content of the files that `--calibration` names: earlier counts, or else a corpus to count on."""

    counts: tuple[TokenCounts, ...]
    corpus: Corpus | None


def read_calibration(names: Sequence[str | Path]) -> CalibrationInput:
    """Read all of `names` before any long work begins.

    Args:
        names: Text files and directories, or files of token counts; empty: the built-in corpus.

    Raises:
        VocabtrimError: A file cannot be read, or text and counts are mixed.
    """
    paths = [Path(name) for name in names]
    counted = [path for path in paths if path.suffix == ".safetensors"]
    if counted and len(counted) < len(paths):
        raise VocabtrimError("--calibration takes either text to calibrate on or token counts, not both")
    if counted:
        return CalibrationInput(tuple(TokenCounts.load(path) for path in counted), None)
    return CalibrationInput((), read_corpus(paths) if paths else builtin_corpus())


def count_tokens(
    sources: Mapping[Role, Source],
    data: CalibrationInput,
    settings: CalibrationSettings,
    checkpoint: Path,
    progress: Callable[[int, int], None],
    on_skip: Callable[[Skipped], None],
) -> TokenCounts:
    """Add up earlier counts, or calibrate.

    Args:
        sources: The loaded models by role.
        data: What `read_calibration` read.
        settings: How to calibrate.
        checkpoint: The file that a calibration rewrites as it goes.
        progress: Called with (tokens so far, tokens to count).
        on_skip: Called for each record of the data that is left out.

    Raises:
        VocabtrimError: The counts come from another tokenizer, or the model that is to generate is not there.
    """
    if data.corpus is None:
        counts = reduce(add, data.counts)
        if counts.tokenizer_digest not in {source.tokenizer_digest for source in sources.values()}:
            raise VocabtrimError("the token counts were made with another tokenizer than the model's: calibrate again")
        return counts
    how = settings.calibration_source or ("target" if "target" in sources else "drafter")
    role = next(iter(sources)) if how == "text" else how
    if role not in sources:
        raise VocabtrimError(f"--calibration-source {role} needs a --{role} to generate with")
    source = sources[role]
    for skipped in data.corpus.skipped:
        on_skip(skipped)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    run = partial(
        calibrate,
        tokenizer=source.tokenizer,
        corpus=data.corpus,
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
    """Load the model that counts, and write its counts to `output`; an interrupted run is continued.

    Args:
        drafter: MODEL of the drafter, if there is one.
        target: MODEL of the target, if there is one.
        output: The `.safetensors` file of token counts.
        settings: How to calibrate.
        progress: Called with (tokens so far, tokens to count).
        on_skip: Called for each record of the data that is left out.

    Raises:
        VocabtrimError: No model is named, a model or a file cannot be read, or see `calibrate`.
    """
    if drafter is None and target is None:
        raise VocabtrimError("nothing to calibrate: give --target or --drafter")
    if output.suffix != ".safetensors":
        raise VocabtrimError(f"--output {output}: name the file of token counts something.safetensors")
    data = read_calibration(settings.calibration)
    if data.corpus is None:
        counts = reduce(add, data.counts)
        with alone(output):
            counts.save(output)
        return counts
    role: Role = "target" if target and settings.calibration_source != "drafter" else "drafter"
    spec = target if role == "target" else drafter
    if spec is None:
        raise VocabtrimError("--calibration-source drafter needs a --drafter to generate with")
    source = load_source(spec, torch.float32)
    with alone(output):
        return count_tokens({role: source}, data, settings, output, progress, on_skip)
