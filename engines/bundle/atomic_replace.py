"""Several directories are replaced as one, even if the process is killed in between.

A commit mark, a small file, decides: before it is written the old directories are valid, after it the new ones. A
reader that finds a mark completes the replacement that it announces.
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
    """Hold the lock file `path` for the `with` block. The system releases the lock if the process dies.

    Yields:
        False where another process holds the lock.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            is_free = _flock(descriptor)
            if is_free and not _is_at(descriptor, path):
                continue  # the lock's last holder removed the file meanwhile
            try:
                yield is_free
            finally:
                if is_free:
                    path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def commit(directory: Path, aside: Path, names: Sequence[str]) -> None:
    """Move `aside/new/NAME` to `directory/NAME` for all names, or for none; what was there goes to `aside/old`.

    Args:
        directory: The directory whose entries are replaced. The caller holds its lock.
        aside: A directory inside `directory`.
        names: The entries to replace.
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
    """Complete a commit whose process died. The caller holds the lock of `directory`.

    Raises:
        VocabtrimError: The mark of the commit is not ours.
    """
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
    """Call `finish` for a reader, which waits while another process completes the commit.

    Raises:
        VocabtrimError: The commit cannot be completed.
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
    """Move the new entries in. It may be interrupted anywhere and called again: the result is the same."""
    for name in names:
        place, new = directory / name, aside / "new" / name
        if new.exists():
            if place.exists():
                place.rename(aside / "old" / name)
            new.rename(place)


def _back(directory: Path, aside: Path, names: Sequence[str]) -> None:
    """Undo `_forward`. After each step, until the mark is gone, `_forward` can still complete the commit."""
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
