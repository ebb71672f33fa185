"""A calibration's file while it runs: it is rewritten from time to time, and an interrupted run continues from it."""

import hashlib
import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from time import monotonic

from engines.errors import VocabtrimError
from vocabtrim_export.calibration.batches import Batch
from vocabtrim_export.calibration.counts import TokenCounts
from vocabtrim_export.calibration.partial_batch import PartialBatch
from vocabtrim_export.calibration.sufficiency import Evidence

# Settings of a run whose names say nothing to a user.
_KNOWN_AS = {"corpus_digest": "text", "model_digest": "model", "chat": "chat template"}


class Saver:
    """Writes the counts, and the work on an unfinished batch, from time to time."""

    def __init__(self, checkpoint: Path | None, seconds: float, saved: TokenCounts, evidence: Evidence | None) -> None:
        self.checkpoint, self.seconds, self.last = checkpoint, seconds, monotonic()
        self.saved: TokenCounts | None = saved
        self.evidence = evidence
        run = saved.runs[0]
        settings = {each.name: getattr(run, each.name) for each in fields(run) if each.compare}
        self._key: tuple[object, ...] = settings, saved.tokenizer_digest
        self._unfinished: dict[Batch, PartialBatch] = {}

    def unfinished(self, batch: Batch) -> PartialBatch | None:
        """Returns the place on disk where the work on this batch is kept; None without a checkpoint."""
        if self.checkpoint is None:
            return None
        key = json.dumps([*self._key, asdict(batch)], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()
        place = self._directory(self.checkpoint) / digest[:16]
        return self._unfinished.setdefault(batch, PartialBatch(place, digest, self.seconds))

    def take(self, counts: TokenCounts, batch: Batch) -> None:
        """Save the counts at the end of a batch where it is time, or where the files of the batch are to be removed."""
        unfinished = self._unfinished.pop(batch, None)
        if monotonic() - self.last >= self.seconds or (unfinished is not None and unfinished.count):
            self.save(counts)
        if unfinished is not None:
            unfinished.clear()

    def finish(self, counts: TokenCounts) -> None:
        """Save the counts alone, and remove the files of unfinished batches."""
        had_evidence, self.evidence = self.evidence is not None, None
        if self.checkpoint is None:
            return
        if had_evidence and self.checkpoint.exists():
            self.saved = None
        self.save(counts)
        shutil.rmtree(self._directory(self.checkpoint), ignore_errors=True)

    @staticmethod
    def _directory(checkpoint: Path) -> Path:
        return checkpoint.with_name(f"{checkpoint.name}.partial")

    def save(self, counts: TokenCounts) -> None:
        """Save the counts, once."""
        if self.checkpoint is not None and counts is not self.saved:
            counts.save(self.checkpoint, self.evidence.tensors() if self.evidence else None)
            self.saved, self.last = counts, monotonic()


def resume(checkpoint: Path, fresh: TokenCounts) -> TokenCounts:
    """Returns the counts in the file, once they prove to come from the same settings as `fresh`.

    Raises:
        VocabtrimError: They cannot be read, or come from other settings, or from several calibrations.
    """
    try:
        saved, wanted = TokenCounts.load(checkpoint), fresh.runs[0]
    except VocabtrimError as error:
        why = str(error).rpartition(": ")[0]
        raise VocabtrimError(f"{why}: name another file to write, or remove this one") from error
    if len(saved.runs) != 1:
        raise VocabtrimError(f"{checkpoint} is a sum of calibrations, which cannot be continued: name another file")
    differ = [f.name for f in fields(wanted) if f.compare and getattr(saved.runs[0], f.name) != getattr(wanted, f.name)]
    if (saved.tokenizer_digest, saved.full_vocab) != (fresh.tokenizer_digest, fresh.full_vocab):
        differ.append("tokenizer")
    if differ:
        names = ", ".join(_KNOWN_AS.get(name, name.replace("_", " ")) for name in differ)
        raise VocabtrimError(
            f"{checkpoint} was calibrated with another {names}: remove it to start again, or name another file"
        )
    return saved
