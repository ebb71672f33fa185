"""How several directories take their places as one: a commit mark is the moment; before it the old ones stand, after it
the new ones, whoever is killed in between. A reader that finds the mark finishes what it announces.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from engines.bundle.graph_file import is_plain_name
from engines.bundle.typed_json import decode, read
from engines.errors import VocabtrimError

ASIDE = ".vocabtrim-"
LOCK_NAME = f"{ASIDE}lock"
MARK_NAME = f"{ASIDE}commit"
_PATIENCE = 10.0  # seconds; the renames take milliseconds


@dataclass(frozen=True, slots=True)
class _Mark:
    """The content of a commit mark, which announces that every `aside/new/NAME` takes its place."""

    aside: str
    names: tuple[str, ...]


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold the lock file `path` for the block; False where another process holds it. Death releases it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            is_free = _flock(descriptor)
            if is_free and not _is_at(descriptor, path):
                continue  # its last holder removed it meanwhile
            try:
                yield is_free
            finally:
                if is_free:
                    path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def commit(directory: Path, aside: Path, names: Sequence[str]) -> None:
    """Move `aside/new/NAME` to `directory/NAME` for all names, or none; what was there goes to `aside/old`.

    aside: a directory inside `directory`, whose lock the caller holds.
    """
    (aside / "old").mkdir()
    _sync_tree(aside)
    try:
        _write_mark(directory, aside, names)
        _forward(directory, aside, names)
    except BaseException:
        _back(directory, aside, names)
        (directory / MARK_NAME).unlink(missing_ok=True)
        raise
    (directory / MARK_NAME).unlink()
    _sync(directory)


def finish(directory: Path) -> None:
    """Complete a commit that its process did not survive. The caller holds the lock."""
    mark = directory / MARK_NAME
    if not mark.is_file():
        return
    announced: _Mark = decode(_Mark, read(mark), str(mark))
    if not all(map(is_plain_name, (announced.aside, *announced.names))):
        raise VocabtrimError(f"{mark} is not a commit mark of ours: remove it, then export again")
    aside = directory / announced.aside
    if aside.is_dir():
        _forward(directory, aside, announced.names)
    mark.unlink()
    shutil.rmtree(aside, ignore_errors=True)


def finish_if_free(directory: Path) -> None:
    """Do what `finish` does for a reader, which waits while another process does it.

    Raises:
        VocabtrimError: It fails.
    """
    mark, until = directory / MARK_NAME, time.monotonic() + _PATIENCE
    while mark.is_file():
        try:
            with try_lock(directory / LOCK_NAME) as free:
                if free:
                    finish(directory)
        except OSError as error:
            raise VocabtrimError(
                f"an export was killed just before its bundles in {directory} took their places, and finishing it "
                f"failed ({error.strerror}): make the directory writable and try again"
            ) from error
        if not free:
            if time.monotonic() > until:
                raise VocabtrimError(f"{directory} is being replaced by an export: try again")
            time.sleep(0.01)


def _forward(directory: Path, aside: Path, names: Sequence[str]) -> None:
    """Again and again, from wherever it was interrupted, with one result."""
    for name in names:
        place, new = directory / name, aside / "new" / name
        if new.exists():
            if place.exists():
                place.rename(aside / "old" / name)
            new.rename(place)


def _back(directory: Path, aside: Path, names: Sequence[str]) -> None:
    """Undo `_forward`. Until the mark is gone, each step leaves what `_forward` can complete."""
    for name in names:
        place, new, old = directory / name, aside / "new" / name, aside / "old" / name
        if not new.exists():
            place.rename(new)
        if old.exists():
            old.rename(place)


def _write_mark(directory: Path, aside: Path, names: Sequence[str]) -> None:
    fresh = aside / MARK_NAME
    with fresh.open("w", encoding="utf-8") as file:
        json.dump(asdict(_Mark(aside.name, tuple(names))), file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(directory / MARK_NAME)
    _sync(directory)


def _sync_tree(root: Path) -> None:
    for path in (root, *root.rglob("*")):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flock(descriptor: int) -> bool:
    import fcntl  # where there is none (Windows), bundles can still be read

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
