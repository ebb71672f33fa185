"""Calibration: which tokens a model really uses, counted on real text. Importing this does not load torch."""

from vocabtrim_export.calibration.calibrate import BatchLimits, Source, calibrate
from vocabtrim_export.calibration.corpus import Corpus, Document, Message, builtin_corpus, read_corpus
from vocabtrim_export.calibration.counts import CalibrationRun, TokenCounts

__all__ = [
    "BatchLimits",
    "CalibrationRun",
    "Corpus",
    "Document",
    "Message",
    "Source",
    "TokenCounts",
    "builtin_corpus",
    "calibrate",
    "read_corpus",
]
