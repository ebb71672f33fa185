"""The checks of a bundle: loading stops at the first that fails, and `vocabtrim inspect --check` shows them all."""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.bundle.graph_file import PREFIX, GraphFile, is_plain_name
from engines.bundle.head_rows import HeadRows
from engines.bundle.manifest import (
    DRAFT_MODEL_NAME,
    DRAFT_PLAN_NAME,
    EXPECTED_NAME,
    FEATURES_NAME,
    HEAD_ROWS_NAME,
    MANIFEST_NAME,
    MODEL_NAME,
    PLAN_NAME,
    VOCAB_MAP_NAME,
    WEIGHTS_NAME,
    FileDigest,
    Manifest,
)
from engines.bundle.tokenizer import CONFIG_NAME, TEMPLATE_NAME, TEMPLATES_NAME, TOKENIZER_NAME, Tokenizer
from engines.bundle.vocab_map import VocabMap
from engines.errors import VocabtrimError

# The files that a load reads where they exist: one that the manifest does not name must not have been added.
_READ_IF_THERE = (
    *(MODEL_NAME, DRAFT_MODEL_NAME, FEATURES_NAME, PLAN_NAME, DRAFT_PLAN_NAME, VOCAB_MAP_NAME),
    *(HEAD_ROWS_NAME, EXPECTED_NAME, TOKENIZER_NAME, CONFIG_NAME, TEMPLATE_NAME, TEMPLATES_NAME),
)


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        name: The file or the property that was checked.
        wrong: One line that says what is wrong; None where the check passed.
    """

    name: str
    wrong: str | None


def file_checks(root: Path, manifest: Manifest) -> list[Check]:
    """Check that every file is inside the bundle with the size and digest in the manifest, and that none was added.

    The digest of the weights is left to `slow_checks`.
    """
    checks: dict[str, Callable[[], None]] = {
        name: lambda name=name, stated=stated: _check_file(root, name, stated)  # type: ignore[misc]
        for name, stated in manifest.files.items()
    }
    return _run(checks | {"no added file": lambda: _check_added(root, manifest)})


def slow_checks(root: Path, manifest: Manifest) -> list[Check]:
    """Check the digest of the weights, and that the tokenizer is the manifest's.

    They take as long as opening a session does, which may go on at the same time: nothing parses the weights, and the
    tokenizer's file has its digest.
    """
    checks: dict[str, Callable[[], None]] = {}
    if WEIGHTS_NAME in manifest.files:
        checks[f"{WEIGHTS_NAME} digest"] = lambda: _check_digest(root, WEIGHTS_NAME, manifest.files[WEIGHTS_NAME])
    if TOKENIZER_NAME in manifest.files:
        checks["tokenizer"] = lambda: _check_tokenizer(root, manifest)
    return _run(checks)


def content_checks(root: Path, manifest: Manifest, thorough: bool) -> list[Check]:
    """Check that the map and the graphs belong together.

    Args:
        root: The bundle's directory.
        manifest: The bundle's manifest.
        thorough: Hash the LM head's rows by themselves as well.
    """
    checks: dict[str, Callable[[], None]] = {"vocab map": lambda: _check_map(root, manifest)}
    for name in (MODEL_NAME, DRAFT_MODEL_NAME, FEATURES_NAME):
        if name in manifest.files:
            checks[f"{name} metadata"] = lambda name=name: _check_metadata(root / name, manifest)  # type: ignore[misc]
    if MODEL_NAME in manifest.files and manifest.vocab_map:
        checks["baked table"] = lambda: _check_table(root, manifest)
    if manifest.slots:
        checks["rows for slots"] = lambda: _check_head_rows(root, manifest)
    if MODEL_NAME in manifest.files and thorough:
        checks["head rows"] = lambda: _check_head(root / MODEL_NAME, manifest)
    return _run(checks)


def graph_metadata(manifest: Manifest) -> dict[str, str]:
    """Returns the metadata that a bundle's graphs carry: the digests of the bundle that they belong to."""
    digests = {
        "vocab_map": manifest.vocab_map or "",
        "tokenizer": manifest.tokenizer,
        "head": manifest.head,
        "model": manifest.source_digest,
    }
    return {f"{PREFIX}{name}": digest for name, digest in digests.items()}


def load_map(root: Path, manifest: Manifest) -> VocabMap | None:
    """Returns the table of a trimmed head's rows; None for a full head.

    Args:
        root: The bundle's directory.
        manifest: The bundle's manifest, whose digest of the table was compared before.

    Raises:
        VocabtrimError: The file is something else.
    """
    return VocabMap.load(root / VOCAB_MAP_NAME) if manifest.vocab_map else None


def file_digest(path: Path) -> str:
    """Returns the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run(checks: Mapping[str, Callable[[], None]]) -> list[Check]:
    """Run all checks in threads: most of their time is hashing, which releases Python's lock."""

    def run(name: str) -> Check:
        try:
            checks[name]()
        except VocabtrimError as error:
            return Check(name, str(error))
        except OSError as error:
            return Check(name, f"cannot read {error.filename or name}: {error.strerror}")
        return Check(name, None)

    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(run, checks))


def _check_file(root: Path, name: str, stated: FileDigest) -> None:
    path = root / name
    if not is_plain_name(name):
        raise VocabtrimError(f"{root / MANIFEST_NAME} names the file {name[:200]!r}, which is not inside the bundle")
    if not path.is_file():
        raise VocabtrimError(f"{root} lacks {name}, which its {MANIFEST_NAME} names: export the bundle again")
    if path.resolve().parent != root.resolve():
        raise VocabtrimError(f"{path} is a link that leaves the bundle: put the file itself there")
    size = path.stat().st_size
    if size != stated.bytes:
        cut = "is cut short" if size < stated.bytes else "is too long"
        raise VocabtrimError(
            f"{path} {cut}: {size} bytes, {MANIFEST_NAME} says {stated.bytes}: copy or export it again"
        )
    if name != WEIGHTS_NAME:
        _check_digest(root, name, stated)


def _check_digest(root: Path, name: str, stated: FileDigest) -> None:
    if file_digest(root / name) != stated.sha256:
        raise VocabtrimError(f"{root / name} does not match its digest in {MANIFEST_NAME}: copy or export it again")


def _check_added(root: Path, manifest: Manifest) -> None:
    for name in _READ_IF_THERE:
        if name not in manifest.files and (root / name).exists():
            raise VocabtrimError(
                f"{root / name} is not of this bundle, its {MANIFEST_NAME} names no such file: remove it"
            )


def _check_map(root: Path, manifest: Manifest) -> None:
    vocab_map = load_map(root, manifest)
    if vocab_map is None:
        if manifest.head_rows != manifest.vocab_size:
            raise VocabtrimError(f"{root / MANIFEST_NAME} names no VocabMap for a head of fewer rows: export again")
        return
    actual = vocab_map.digest, len(vocab_map), vocab_map.full_vocab
    if actual != (manifest.vocab_map, manifest.head_rows, manifest.vocab_size):
        raise VocabtrimError(f"{root / VOCAB_MAP_NAME} is not the VocabMap that {MANIFEST_NAME} names: export again")


def _check_tokenizer(root: Path, manifest: Manifest) -> None:
    if Tokenizer.load(root).digest != manifest.tokenizer:
        raise VocabtrimError(f"{root / TOKENIZER_NAME} is not the tokenizer that {MANIFEST_NAME} names: export again")


def _check_metadata(path: Path, manifest: Manifest) -> None:
    metadata = GraphFile.read(path).metadata
    for key, wanted in graph_metadata(manifest).items():
        if metadata.get(key) != wanted:
            what = key.removeprefix(PREFIX).replace("_", " ")
            raise VocabtrimError(f"{path} was made for another {what} than {MANIFEST_NAME} names: export again")


def _check_table(root: Path, manifest: Manifest) -> None:
    vocab_map = load_map(root, manifest)
    if vocab_map and not np.array_equal(GraphFile.read(root / MODEL_NAME).table(), vocab_map.kept_token_ids):
        raise VocabtrimError(f"the table inside {root / MODEL_NAME} is not {VOCAB_MAP_NAME}: export again")


def _check_head_rows(root: Path, manifest: Manifest) -> None:
    if (vocab_map := load_map(root, manifest)) is not None:
        HeadRows(root / HEAD_ROWS_NAME, vocab_map, manifest.head_rows_quantization)


def _check_head(path: Path, manifest: Manifest) -> None:
    graph = GraphFile.read(path)
    if graph.digest(graph.head_tensors()) != manifest.head:
        raise VocabtrimError(f"the head's rows in {path} are not those that {MANIFEST_NAME} names: export again")
