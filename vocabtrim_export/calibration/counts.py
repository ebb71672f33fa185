"""`TokenCounts`: how often each token was seen, and where that was found out."""

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from engines.errors import VocabtrimError

FORMAT = "vocabtrim-token-counts-1"
HELD_OUT_EVERY = 8


@dataclass(frozen=True, slots=True)
class CalibrationRun:
    """One calibration: its settings, and how far it came. Two runs of equal settings count exactly the same tokens.

    source: "drafter" or "target" (tokens sampled from that model), or "text". `temperature`, `dtype`, `model_digest`
    and the limits (prompts a batch, tokens a prompt, tokens a continuation) are 0 or empty for "text".
    documents_done: documents counted so far, the second and later passes over the corpus included.
    """

    source: str
    corpus_digest: str
    seed: int
    model_digest: str = ""
    dtype: str = ""
    temperature: float = 0.0
    batch_size: int = 0
    max_prompt_tokens: int = 0
    max_new_tokens: int = 0
    corpus: str = field(default="", compare=False)
    documents_done: int = field(default=0, compare=False)
    tokens: int = field(default=0, compare=False)


@dataclass(frozen=True, eq=False, slots=True)
class TokenCounts:
    """How often each token was seen.

    counts: int64[full_vocab], from the documents that choose a map.
    held_out: int64[full_vocab], from the documents kept apart (`is_held_out`), which only ever measure one.
    tokenizer_digest: of the token ↔ id table the ids belong to.
    Raises `VocabtrimError` for arrays of another form.
    """

    counts: NDArray[np.int64]
    held_out: NDArray[np.int64]
    tokenizer_digest: str
    runs: tuple[CalibrationRun, ...]

    def __post_init__(self) -> None:
        for name in ("counts", "held_out"):
            array = np.array(getattr(self, name))  # a copy: nobody else can change it
            if array.ndim != 1 or array.dtype != np.int64 or array.size == 0 or array.min() < 0:
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
        """Where the tokens came from: "target", or "target+text" for a sum."""
        return "+".join(dict.fromkeys(run.source for run in self.runs))

    @property
    def digest(self) -> str:
        """sha256 over the tokenizer's digest and both arrays (little-endian): equal for equal counts."""
        data = np.concatenate([self.counts, self.held_out]).astype("<i8").tobytes()
        return hashlib.sha256(self.tokenizer_digest.encode() + data).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Provenance as plain JSON data, for a bundle's manifest."""
        return {
            "digest": self.digest,
            "source": self.source,
            "tokens": self.total,
            "held_out_tokens": int(self.held_out.sum()),
            "runs": [asdict(run) for run in self.runs],
        }

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        """Counts of one tokenizer add up. Refuses another vocabulary, and a run that both already contain."""
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
        return TokenCounts(
            self.counts + other.counts, self.held_out + other.held_out, self.tokenizer_digest, self.runs + other.runs
        )

    def resized(self, full_vocab: int) -> "TokenCounts":
        """The same counts for a head of `full_vocab` rows, as models of one tokenizer pad their heads differently.

        New rows were never counted. Rows that go must not have been counted, or `VocabtrimError` is raised.
        """
        if np.any(self.counts[full_vocab:]) or np.any(self.held_out[full_vocab:]):
            raise VocabtrimError(
                f"the calibration counted token ids from {full_vocab} up, which a head of {full_vocab} rows does not "
                "have: the model and the calibration are of different vocabularies"
            )
        pad = (0, max(0, full_vocab - self.full_vocab))
        counts, held_out = (np.pad(array[:full_vocab], pad) for array in (self.counts, self.held_out))
        return TokenCounts(counts, held_out, self.tokenizer_digest, self.runs)

    def save(self, path: Path) -> None:
        """Write a safetensors file. It appears whole or not at all: what was at `path` stays until the last moment."""
        metadata = {
            "format": FORMAT,
            "tokenizer_digest": self.tokenizer_digest,
            "runs": json.dumps([asdict(run) for run in self.runs]),
        }
        _replace_file(Path(path), save({"counts": self.counts, "held_out": self.held_out}, metadata))

    @classmethod
    def load(cls, path: Path) -> "TokenCounts":
        """Read what `save` wrote. Raises `VocabtrimError` where `path` is something else."""
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise VocabtrimError(f"{path} holds no token counts of this version: calibrate again")
                runs = tuple(CalibrationRun(**run) for run in json.loads(metadata["runs"]))
                return cls(file.get_tensor("counts"), file.get_tensor("held_out"), metadata["tokenizer_digest"], runs)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise VocabtrimError(f"{path} is not a file of token counts ({error}): calibrate again") from error


def is_held_out(document: int, documents: int) -> bool:
    """Whether the document at this index is kept apart: the last of every eight, or of all where there are fewer.

    A single document is not held out: then no coverage can be measured.
    """
    every = min(HELD_OUT_EVERY, documents)
    return every > 1 and document % every == every - 1


def _replace_file(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")  # in the same directory: a rename must not cross a disk
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise VocabtrimError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
