"""Token counts for an export: read from earlier calibrations, or counted with the right one of the loaded models."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from engines.bundle.read import Role
from engines.bundle.tokenizer import tokenizer_digest
from engines.errors import VocabtrimError
from vocabtrim_export.bundles.output import alone
from vocabtrim_export.calibration import CalibrationSource, Corpus, TokenCounts, builtin_corpus, read_corpus
from vocabtrim_export.calibration.combinations import are_counts, check_combination
from vocabtrim_export.calibration.count_settings import check_counting
from vocabtrim_export.calibration.counter import NOBODY, CountJob, Listener, count_data
from vocabtrim_export.calibration.domains import Domain, read_domains
from vocabtrim_export.calibration.sufficiency import HeadSize
from vocabtrim_export.sources.precision import calibration_model
from vocabtrim_export.sources.source import Source, load_source, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

QUARTER = 4  # a trim pays where the head keeps at most this part of the vocabulary


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """Settings of a calibration. The fields are named like the command line's options.

    Attributes:
        calibration: Text files and directories, or files of token counts; empty: a corpus that comes with Python. As
            "name=path:weight" they are domains, counted apart and mixed by weight.
        calibration_source: The model that generates, or "text"; None takes the target where there is one, else the
            drafter.
        calibration_tokens: The number of tokens to count; "auto": as many generated ones as are enough for the K of the
            export, see `vocabtrim_export.calibration.sufficiency`, or all of a text, up to its `MOST_OF_TEXT`.
        temperature: Temperature of sampling; 0 is greedy.
        seed: Seed of the random numbers that tokens are drawn with.
        calibration_endpoint: The base URL of a server with OpenAI's protocol that generates; None: the model itself.
        calibration_model: The model's name there.
        ray: The address of a Ray cluster that counts or generates, "" for the one of this machine; None: this process.
        chat_template: See `ChatOptions`.
        template_args: See `ChatOptions`.
    """

    calibration: tuple[str | Path, ...] = ()
    calibration_source: CalibrationSource | None = None
    calibration_tokens: int | Literal["auto"] = "auto"
    temperature: float = 1.0
    seed: int = 0
    calibration_endpoint: str | None = None
    calibration_model: str | None = None
    ray: str | None = None
    chat_template: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every value, and that none would be ignored.

        Raises:
            VocabtrimError: A value is out of range, or would be ignored.
        """
        if isinstance(self.calibration, str | Path):
            raise VocabtrimError(f"calibration is {str(self.calibration)!r}: give a list of paths")
        tokens = 1 if self.calibration_tokens == "auto" else self.calibration_tokens
        check_counting(self.calibration_source or "text", tokens, self.seed, self.temperature)
        check_combination(self)


@dataclass(frozen=True, slots=True)
class CalibrationInput:
    """The content of the files that `--calibration` names: earlier counts, or else a corpus to count on.

    Attributes:
        counts: Earlier counts; empty where there is text to count on.
        corpus: The documents of all files; None where counts were given, or domains.
        domains: The documents of each named file; empty where files have no names.
    """

    counts: tuple[TokenCounts, ...] = ()
    corpus: Corpus | None = None
    domains: tuple[Domain, ...] = ()

    @property
    def corpora(self) -> tuple[Corpus, ...]:
        """The documents that are counted together, of each domain apart."""
        return (self.corpus,) if self.corpus else tuple(domain.corpus for domain in self.domains)


def read_calibration(names: Sequence[str | Path]) -> CalibrationInput:
    """Read all of `names` before any long work begins.

    Args:
        names: Text files and directories, or files of token counts; empty: the built-in corpus. Each may be a domain,
            "name=path" or "name=path:weight".

    Raises:
        VocabtrimError: A file cannot be read, or text and counts are mixed.
    """
    if domains := read_domains(names):
        return CalibrationInput(domains=domains)
    paths = [Path(name) for name in names]
    counted = [path for path in paths if path.suffix == ".safetensors"]
    if counted and len(counted) < len(paths):
        raise VocabtrimError("--calibration takes either text to calibrate on or token counts, not both")
    if counted:
        return CalibrationInput(tuple(TokenCounts.load(path) for path in counted))
    return CalibrationInput(corpus=read_corpus(paths) if paths else builtin_corpus())


def calibration_source(settings: CalibrationSettings, roles: Collection[Role]) -> CalibrationSource:
    """Returns whose tokens are counted, given the models that were named.

    Raises:
        VocabtrimError: The model that should generate was not named.
    """
    how = settings.calibration_source or ("target" if "target" in roles else "drafter")
    if how != "text" and how not in roles:
        raise VocabtrimError(f"--calibration-source {how} needs a --{how} to generate with")
    return how


def count_tokens(
    sources: Mapping[Role, Source],
    data: CalibrationInput,
    settings: CalibrationSettings,
    checkpoint: Path,
    rows: HeadSize | None = None,
    listener: Listener = NOBODY,
) -> TokenCounts:
    """Add up earlier counts, or calibrate.

    Args:
        sources: The loaded models by role.
        data: The result of `read_calibration`.
        settings: The settings of the calibration.
        checkpoint: The file that a calibration rewrites as it goes.
        rows: The rows of the head that `auto` counts for: a number, or the share of held-out tokens to cover; None: a
            quarter of the vocabulary.
        listener: The functions to call meanwhile.

    Raises:
        VocabtrimError: The counts come from another tokenizer, or the model that should generate was not named.
    """
    if data.counts:
        counts = reduce(add, data.counts)
        if counts.tokenizer_digest not in {source.tokenizer_digest for source in sources.values()}:
            raise VocabtrimError("the token counts were made with another tokenizer than the model's: calibrate again")
        return counts
    how = calibration_source(settings, sources.keys())
    source = next(iter(sources.values())) if how == "text" else sources[how]
    job = CountJob(how, settings, checkpoint, rows or source.vocab_size // QUARTER, listener)
    if how == "text" or settings.calibration_endpoint or settings.ray is not None:
        return count_elsewhere(source.tokenizer, data, job, source.name)
    with calibration_model(source.model) as model:
        return count_data(model, source.tokenizer, data, job, source.digest)


def count_elsewhere(
    tokenizer: "PreTrainedTokenizerFast", data: CalibrationInput, job: CountJob, spec: str
) -> TokenCounts:
    """Count a text, or what a server or the processes of a Ray cluster generate.

    Args:
        tokenizer: The model's tokenizer.
        data: Text, no counts.
        job: The settings of the counting; 0 rows stand for a quarter of the vocabulary.
        spec: MODEL that generates on a cluster.

    Raises:
        VocabtrimError: See `calibrate` and `ray_workers`.
    """
    if job.settings.ray is None:
        return count_data(None, tokenizer, data, replace(job, rows=job.rows or len(tokenizer) // QUARTER))
    from vocabtrim_export.calibration.ray_workers import ray_workers

    with ray_workers(job.settings.ray, tokenizer, None if job.source == "text" else spec) as workers:
        vocab_size = workers.facts.rows if workers.facts else len(tokenizer)
        job = replace(job, rows=job.rows or vocab_size // QUARTER, workers=workers)
        return count_data(None, tokenizer, data, job, workers.digest)


def _add_up(counts: Sequence[TokenCounts], specs: Iterable[str], output: Path) -> TokenCounts:
    """Write the sum of counts, which must be of the models' tokenizer where models are named."""
    total = reduce(add, counts)
    for spec in specs:
        if tokenizer_digest(load_tokenizer(spec).backend_tokenizer) != total.tokenizer_digest:
            raise VocabtrimError(f"the token counts were made with another tokenizer than {spec}'s: calibrate again")
    with alone(output):
        total.save(output)
    return total


def calibrate_models(
    drafter: str | None,
    target: str | None,
    output: Path,
    settings: CalibrationSettings,
    listener: Listener = NOBODY,
) -> TokenCounts:
    """Load the model that generates, and write its counts to `output`; an interrupted run is continued.

    Counting a text loads no model, only a tokenizer. `auto` counts for a head of a quarter of the vocabulary.

    Args:
        drafter: MODEL of the drafter, if there is one.
        target: MODEL of the target, if there is one.
        output: The `.safetensors` file of token counts.
        settings: The settings of the calibration.
        listener: The functions to call meanwhile.

    Raises:
        VocabtrimError: No model is named, or one that would not be used, a model or a file cannot be read, or see
            `calibrate`.
    """
    pairs: tuple[tuple[Role, str | None], ...] = (("drafter", drafter), ("target", target))
    specs = {role: spec for role, spec in pairs if spec is not None}
    if not specs and not are_counts(settings.calibration):
        raise VocabtrimError("nothing to calibrate: give --target or --drafter")
    if output.suffix != ".safetensors":
        raise VocabtrimError(f"--output {output}: name the file of token counts something.safetensors")
    if are_counts(settings.calibration):
        return _add_up(read_calibration(settings.calibration).counts, specs.values(), output)
    how = calibration_source(settings, specs)
    if len(specs) > 1:
        unused = "drafter" if how != "drafter" else "target"
        raise VocabtrimError(f"--{unused} would not be used, the {how}'s tokens are counted: leave it out")
    data = read_calibration(settings.calibration)
    if how == "text" or settings.calibration_endpoint or settings.ray is not None:
        (spec,) = specs.values()
        with alone(output):
            return count_elsewhere(load_tokenizer(spec), data, CountJob(how, settings, output, 0, listener), spec)

    def on_read(done: int, total: int) -> None:
        listener.progress("load", done >> 20, total >> 20)

    source = load_source(specs[how], torch.float32, on_read)
    with alone(output):
        return count_tokens({how: source}, data, settings, output, listener=listener)
