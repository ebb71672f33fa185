"""The output directory: one run at a time, and its bundles appear whole, or what was there before stays."""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engines.bundle.atomic_replace import ASIDE, LOCK_NAME, commit, finish, try_lock
from engines.bundle.read import MANIFEST_NAME
from engines.errors import VocabtrimError

COUNTS_NAME = "token_counts.safetensors"
FORMAT_MARK = "vocabtrim_format.json"
_OURS = (MANIFEST_NAME, FORMAT_MARK)


def check_output(output: Path, names: list[str], force: bool) -> None:
    """Refuse an output directory that holds files, unless `force` allows its bundles to be replaced.

    Token counts are no reason to refuse: an interrupted calibration continues from them.

    Raises:
        VocabtrimError: It is no directory that an export can write, or holds something else.
    """
    _check_place(output)
    ours = (COUNTS_NAME, ASIDE)  # what an interrupted or killed run leaves
    if output.is_dir() and not force and any(not path.name.startswith(ours) for path in output.iterdir()):
        raise VocabtrimError(f"{output} is not empty: choose another --output, or --force to replace its bundles")
    for name in names:
        place = output / name
        is_ours = any((place / mark).is_file() for mark in _OURS)
        if place.exists() and not is_ours and (not place.is_dir() or any(place.iterdir())):
            raise VocabtrimError(f"{place} is not a bundle, so it is not replaced: move it away first")


def _check_place(output: Path) -> None:
    """Refuse a path that cannot be a directory, and one inside a bundle, which is replaced as a whole."""
    if "\0" in str(output):
        raise VocabtrimError(f"{str(output)!r} is no path: name a directory for the output")
    above = [each for each in (output, *output.absolute().parents) if os.path.lexists(each)]
    if above and above[0].is_symlink() and not above[0].exists():
        raise VocabtrimError(f"{above[0]} is a link to nothing: name a directory for the output")
    if above and not above[0].is_dir():
        raise VocabtrimError(f"{above[0]} is a file: name a directory for the output")
    for parent in output.absolute().parents:
        if (parent / MANIFEST_NAME).is_file():
            raise VocabtrimError(f"{output} is inside the bundle {parent}: choose another --output")


def existing_parent(path: Path) -> Path:
    """Returns `path`, or the nearest directory above it that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.is_dir())


@contextmanager
def reserved(directory: Path) -> Iterator[None]:
    """Create `directory` and keep other runs out of it for the block. What a killed run left there is cleared first.

    A directory that was created and stayed empty is removed again.

    Raises:
        VocabtrimError: Another run uses the directory.
    """
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with try_lock(directory / LOCK_NAME) as free:
            if not free:
                raise VocabtrimError(f"another run is writing to {directory}: wait for it, or choose another --output")
            finish(directory)
            _clear(directory)
            yield
    finally:
        if is_new:
            with suppress(OSError):
                directory.rmdir()


@contextmanager
def replacing(paths: list[Path]) -> Iterator[list[Path]]:
    """Do what `placing` does, and reserve the directory for that time only."""
    with reserved(paths[0].parent), placing(paths) as fresh:
        yield fresh


@contextmanager
def placing(paths: list[Path]) -> Iterator[list[Path]]:
    """Create empty directories to fill. When the block succeeds they replace `paths`, all of them or none.

    Each is created next to its place, so that moving it there is one rename. On any failure, Ctrl-C included, they are
    removed and the directories that were there before are as they were. After a kill, a reader sees either the old
    directories or all of the new ones (`engines.bundle.atomic_replace`). The directory must be `reserved`.

    Yields:
        The directories to fill, in the order of `paths`.
    """
    parent = paths[0].parent
    with tempfile.TemporaryDirectory(prefix=ASIDE, dir=parent) as aside:
        fresh = [Path(aside) / "new" / path.name for path in paths]
        for path in fresh:
            path.mkdir(parents=True)
        yield fresh
        commit(parent, Path(aside), [path.name for path in paths])


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all: an earlier file at `path` stays until the last moment.

    Raises:
        VocabtrimError: It cannot be written.
    """
    aside = path.with_name(
        f"{ASIDE}{path.name}.{os.getpid()}"
    )  # in the same directory, because a rename cannot cross disks
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise VocabtrimError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            aside.unlink()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other runs from the file `path`, which this run goes on writing.

    Raises:
        VocabtrimError: Another run writes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with try_lock(path.with_name(f"{ASIDE}{path.name}.lock")) as free:
        if not free:
            raise VocabtrimError(f"another run is writing {path}: wait for it, or choose another --output")
        for left in path.parent.glob(f"{ASIDE}{glob.escape(path.name)}.[0-9]*"):
            left.unlink(missing_ok=True)
        yield


def _clear(directory: Path) -> None:
    """Remove what killed runs were filling. The lock is held, so no run is filling it now."""
    for path in directory.glob(f"{ASIDE}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK_NAME:
            path.unlink(missing_ok=True)
