"""Bundles made runnable: the bundle format, the tokenizer, and the engines that execute what a bundle holds."""

from engines.base import ContextFull, Engine
from engines.bundle.read import Bundle, Manifest, read_bundle
from engines.bundle.vocab_map import VocabMap
from engines.errors import VocabtrimError
from engines.load import load_engine
from engines.outputs import StepOutput

__all__ = [
    "Bundle",
    "ContextFull",
    "Engine",
    "Manifest",
    "StepOutput",
    "VocabMap",
    "VocabtrimError",
    "load_engine",
    "read_bundle",
]
