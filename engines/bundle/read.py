"""The bundle: a directory that holds one engine's files, and `vocabtrim.json`, which says what they are."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engines.bundle.atomic_replace import finish_if_free
from engines.bundle.checks import Check, content_checks, file_checks, file_digest, load_map, slow_checks
from engines.bundle.manifest import (
    DRAFT_MODEL_NAME,
    DRAFT_PLAN_NAME,
    FEATURES_NAME,
    FORMAT_VERSION,
    HEAD_ROWS_NAME,
    MANIFEST_NAME,
    MODEL_NAME,
    PLAN_NAME,
    VOCAB_MAP_NAME,
    WEIGHTS_NAME,
    FileDigest,
    Manifest,
    Role,
)
from engines.bundle.plans import Flavor, Phase, Profile, TensorRT
from engines.bundle.tokenizer import TOKENIZER_NAME
from engines.bundle.typed_json import MAX_BYTES
from engines.bundle.vocab_map import VocabMap
from engines.errors import VocabtrimError

__all__ = [
    "DRAFT_MODEL_NAME",
    "DRAFT_PLAN_NAME",
    "FEATURES_NAME",
    "FORMAT_VERSION",
    "HEAD_ROWS_NAME",
    "MANIFEST_NAME",
    "MODEL_NAME",
    "PLAN_NAME",
    "VOCAB_MAP_NAME",
    "WEIGHTS_NAME",
    "Bundle",
    "Check",
    "FileDigest",
    "Flavor",
    "Manifest",
    "Phase",
    "Profile",
    "Role",
    "TensorRT",
    "check_bundle",
    "file_digest",
    "opened_bundle",
    "read_bundle",
]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that was read and checked: every file is there and has the digest that its manifest states.

    Attributes:
        path: The directory.
        manifest: The bundle's manifest.
        vocab_map: The tokens of a trimmed head's rows; None for a full head.
    """

    path: Path
    manifest: Manifest
    vocab_map: VocabMap | None

    @property
    def tokenizer_file(self) -> Path | None:
        """The path of `tokenizer.json`; None where the bundle has none."""
        return self.path / TOKENIZER_NAME if TOKENIZER_NAME in self.manifest.files else None


def read_bundle(path: str | Path) -> Bundle:
    """Read a bundle directory and check all of its files.

    Raises:
        VocabtrimError: Names the file that is wrong.
    """
    with opened_bundle(path) as bundle:
        return bundle


@contextmanager
def opened_bundle(path: str | Path) -> Iterator[Bundle]:
    """Read a bundle directory; the checks that take long run in other threads while the block loads the bundle.

    Raises:
        VocabtrimError: Names the file that is wrong. Of the checks that take long, it is raised at the end of the
            block, in place of what the block raises.
    """
    if not isinstance(path, str | os.PathLike):
        raise VocabtrimError(f"a bundle is a directory, given as text or as a path; got {path!r}")
    root = Path(path)
    manifest = _read_manifest(root)
    _stop_at_first(file_checks(root, manifest))
    with ThreadPoolExecutor(max_workers=1) as thread:
        slow = thread.submit(slow_checks, root, manifest)
        try:
            _stop_at_first(content_checks(root, manifest, thorough=False))
            yield Bundle(root, manifest, load_map(root, manifest))
        finally:
            _stop_at_first(slow.result())


def check_bundle(path: str | Path) -> list[Check]:
    """Run every check of `read_bundle`, and one of the LM head's rows by themselves.

    Returns:
        All checks and their results.
    """
    root = Path(path)
    try:
        manifest = _read_manifest(root)
    except VocabtrimError as error:
        return [Check("manifest", str(error))]
    checks = file_checks(root, manifest) + slow_checks(root, manifest) + content_checks(root, manifest, thorough=True)
    return [Check("manifest", None), *checks]


def _stop_at_first(checks: list[Check]) -> None:
    for check in checks:
        if check.wrong is not None:
            raise VocabtrimError(check.wrong)


def _read_manifest(root: Path) -> Manifest:
    finish_if_free(root.absolute().parent)
    path = root / MANIFEST_NAME
    if root.is_file():
        raise VocabtrimError(f"{root} is a file, a bundle is a directory: make one of a model with `vocabtrim-export`")
    if not root.is_dir():
        raise VocabtrimError(f"no bundle at {root}: make one with `vocabtrim-export --output {root.parent}`")
    if not path.is_file():
        inside = [name for name in ("target", "drafter") if (root / name / MANIFEST_NAME).is_file()]
        is_model = not inside and (root / "config.json").is_file()
        hint = f"; did you mean {root / inside[0]}?" if inside else "; it is a model: export it" if is_model else ""
        raise VocabtrimError(f"{root} is not a bundle: it has no {MANIFEST_NAME}{hint}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise VocabtrimError(f"{path} is larger than any bundle manifest: export the bundle again")
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VocabtrimError(f"cannot read {path} ({error})") from error
    return Manifest.from_json(text, str(path))
