"""`TokenCounts`: how often each token was seen, and which calibrations counted it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from engines.bundle.typed_json import brief, decode, parse
from engines.errors import VocabtrimError
from vocabtrim_export.bundles.output import write_whole
from vocabtrim_export.calibration.calibration_run import CalibrationRun

FORMAT = "vocabtrim-token-counts-2"
FIRST_FORMAT = "vocabtrim-token-counts-1"  # it has no digest of its own
_MOST = 1 << 48  # the largest count of one token: sums stay far from overflow
HELD_OUT_EVERY = 8
# Fields of a run that older files lack.
_ADDED = {"chat": "", "next_done": 0, "enough_for": "", "domain": "", "weight": 0.0}


@dataclass(frozen=True, eq=False, slots=True)
class TokenCounts:
    """Counts of each token of a vocabulary.

    Attributes:
        counts: int64[full_vocab], from the documents that choose which tokens are kept.
        held_out: int64[full_vocab], from the documents kept apart (see `is_held_out`), which only measure coverage.
        tokenizer_digest: Identifies the token ↔ id table that the ids belong to.
        runs: The calibrations that were added up.
        domains: The counts of each domain before they were mixed by weight; empty without domains.

    Raises:
        VocabtrimError: The arrays have another form.
    """

    counts: NDArray[np.int64]
    held_out: NDArray[np.int64]
    tokenizer_digest: str
    runs: tuple[CalibrationRun, ...]
    domains: tuple["TokenCounts", ...] = ()

    def __post_init__(self) -> None:
        for name in ("counts", "held_out"):
            array = np.array(getattr(self, name))  # a copy, which no other code can change
            if array.ndim != 1 or array.dtype != np.int64 or array.size == 0 or array.min() < 0 or array.max() > _MOST:
                raise VocabtrimError(f"`{name}` of TokenCounts must be non-negative int64[full_vocab]")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if len(self.counts) != len(self.held_out):
            raise VocabtrimError("`counts` and `held_out` of TokenCounts must be of one length")

    @property
    def full_vocab(self) -> int:
        return len(self.counts)

    @property
    def total(self) -> int:
        """All tokens counted, the held-out ones included."""
        return int(self.counts.sum() + self.held_out.sum())

    @property
    def source(self) -> str:
        """The source of the tokens: "target", or "target+text" for a sum."""
        return "+".join(dict.fromkeys(run.source for run in self.runs))

    @property
    def digest(self) -> str:
        """sha256 over the tokenizer's digest and both arrays (little-endian): equal for equal counts."""
        data = np.concatenate([self.counts, self.held_out]).astype("<i8").tobytes()
        return hashlib.sha256(self.tokenizer_digest.encode() + data).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Returns where the counts come from as plain JSON data, for a bundle's manifest."""
        return {
            "digest": self.digest,
            "source": self.source,
            "tokens": sum(run.tokens for run in self.runs) if self.domains else self.total,
            "held_out_tokens": int(self.held_out.sum()),
            "runs": [asdict(run) for run in self.runs],
        }

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        """Add the counts of other text.

        Raises:
            VocabtrimError: The tokenizers differ, or both contain the same calibration run.
        """
        if (self.tokenizer_digest, self.full_vocab) != (other.tokenizer_digest, other.full_vocab):
            raise VocabtrimError(
                "token counts of different tokenizers cannot be added "
                f"({self.full_vocab} and {other.full_vocab} tokens): calibrate both with one tokenizer"
            )
        seen = {(run.source, run.corpus_digest, run.seed) for run in self.runs}
        for run in other.runs:
            if (run.source, run.corpus_digest, run.seed) in seen:
                raise VocabtrimError(
                    f"both token counts contain the same calibration ({run.source}, {run.corpus or 'unnamed corpus'}, "
                    f"seed {run.seed}): adding it twice would say nothing new; use another seed or corpus"
                )
        runs = tuple(replace(run, weight=0.0) for run in self.runs + other.runs)  # domains are no longer told apart
        return TokenCounts(self.counts + other.counts, self.held_out + other.held_out, self.tokenizer_digest, runs)

    def resized(self, full_vocab: int) -> "TokenCounts":
        """Returns the same counts for an LM head of `full_vocab` rows.

        Models of one tokenizer pad their heads differently. New rows have a count of 0.

        Raises:
            VocabtrimError: A token that was counted would have no row.
        """
        if np.any(self.counts[full_vocab:]) or np.any(self.held_out[full_vocab:]):
            raise VocabtrimError(
                f"the calibration counted token ids from {full_vocab} up, which a head of {full_vocab} rows does not "
                "have: the model and the calibration are of different vocabularies"
            )
        pad = (0, max(0, full_vocab - self.full_vocab))
        counts, held_out = (np.pad(array[:full_vocab], pad) for array in (self.counts, self.held_out))
        domains = tuple(each.resized(full_vocab) for each in self.domains)
        return TokenCounts(counts, held_out, self.tokenizer_digest, self.runs, domains)

    def save(self, path: Path, working: Mapping[str, NDArray[np.int64]] | None = None) -> None:
        """Write a safetensors file; equal counts give equal bytes. It appears whole or not at all.

        Args:
            path: The file.
            working: The state of an unfinished calibration, for `read_working`; `load` does not read it.

        Raises:
            VocabtrimError: The file cannot be written.
        """
        runs = [asdict(run) for run in self.runs]
        fields = {"tokenizer_digest": self.tokenizer_digest, "runs": runs, "sha256": _sha256(self.digest, runs)}
        arrays = {"counts": self.counts, "held_out": self.held_out}
        for each in self.domains:
            domain = each.runs[0].domain
            arrays |= {f"counts.{domain}": each.counts, f"held_out.{domain}": each.held_out}
        text = json.dumps(fields, sort_keys=True)  # safetensors writes keys in any order
        write_whole(Path(path), save({**(working or {}), **arrays}, {FORMAT: text}))

    @classmethod
    def load(cls, path: Path) -> "TokenCounts":
        """Read a file that `save` wrote.

        Raises:
            VocabtrimError: `path` is another kind of file, or was changed since.
        """
        if not Path(path).is_file():
            what = "is a directory or a pipe" if Path(path).exists() else "does not exist"
            raise VocabtrimError(f"{path} {what}: give a file of token counts")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if FORMAT not in metadata and metadata.get("format") != FIRST_FORMAT:
                    raise VocabtrimError(f"{path} holds no token counts of this version: calibrate again")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                counts, held_out = arrays["counts"], arrays["held_out"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise VocabtrimError(f"{path} is not a file of token counts ({brief(error)}): calibrate again") from error
        if FORMAT not in metadata:
            fields = {"tokenizer_digest": metadata.get("tokenizer_digest"), "sha256": ""}
            fields["runs"] = parse(metadata.get("runs", ""), str(path))
        else:
            fields = parse(metadata[FORMAT], str(path))
        written = fields.get("runs") if isinstance(fields, dict) else None
        if isinstance(written, list):
            fields["runs"] = [_ADDED | run if isinstance(run, dict) else run for run in written]
        provenance: _Provenance = decode(_Provenance, fields, str(path))
        whole = cls(counts, held_out, provenance.tokenizer_digest, provenance.runs)
        if FORMAT in metadata and provenance.sha256 != _sha256(whole.digest, written):
            raise VocabtrimError(f"{path} does not match its own digest, it was changed: calibrate again")
        is_mixed = bool(whole.runs) and all(run.weight for run in whole.runs)
        return _with_domains(whole, arrays, path) if is_mixed else whole


def mixed(domains: Sequence[TokenCounts]) -> TokenCounts:
    """Add up counts so that each has the share of tokens that the weight of its run states.

    The domain with the most tokens for its weight is taken as it is, the others are multiplied up to it and rounded.
    """
    weights = np.array([each.runs[0].weight / max(1, each.total) for each in domains])
    factors = weights / weights.min()
    sums = [
        np.sum([np.rint(factor * part) for factor, part in zip(factors, parts, strict=True)], axis=0).astype(np.int64)
        for parts in ([each.counts for each in domains], [each.held_out for each in domains])
    ]
    runs = tuple(run for each in domains for run in each.runs)
    return TokenCounts(sums[0], sums[1], domains[0].tokenizer_digest, runs, tuple(domains))


def _with_domains(whole: TokenCounts, arrays: Mapping[str, NDArray[np.int64]], path: Path) -> TokenCounts:
    """Returns the counts of a file with those of its domains.

    Raises:
        VocabtrimError: The domains do not add up to the counts.
    """
    try:
        pairs = [(run, arrays[f"counts.{run.domain}"], arrays[f"held_out.{run.domain}"]) for run in whole.runs]
        again = mixed([TokenCounts(each[0], each[1], whole.tokenizer_digest, (run,)) for run, *each in pairs])
    except (KeyError, ValueError) as error:
        raise VocabtrimError(f"{path} lacks the counts of a domain ({brief(error)}): calibrate again") from error
    if again.digest != whole.digest:
        raise VocabtrimError(f"{path} holds domains that do not add up to its counts, it was changed: calibrate again")
    return again


def read_working(path: Path) -> dict[str, NDArray[np.int64]]:
    """Returns the tensors that `TokenCounts.save` wrote in addition to the counts."""
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name not in ("counts", "held_out")}  # noqa: SIM118


def _sha256(digest: str, runs: object) -> str:
    """Returns the sha256 over the counts' own digest and the runs that the file states."""
    return hashlib.sha256(f"{digest}{json.dumps(runs, sort_keys=True)}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Provenance:
    """The metadata of a file of token counts."""

    tokenizer_digest: str
    runs: tuple[CalibrationRun, ...]
    sha256: str


def is_held_out(document: int, documents: int) -> bool:
    """Returns whether the document at this index is held out: the last of every eight.

    Where there are fewer than eight, the last of all is held out. A single document is not: no coverage can be
    measured.
    """
    every = min(HELD_OUT_EVERY, documents)
    return every > 1 and document % every == every - 1
