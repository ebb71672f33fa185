"""The output directory: bundles appear whole, or what was there before stays."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engines.bundle import MANIFEST_NAME
from engines.errors import VocabtrimError

COUNTS_NAME = "token_counts.safetensors"
_ASIDE = ".vocabtrim-"


def check_output(output: Path, names: list[str], force: bool) -> None:
    """Refuse an output directory that holds something, unless `force` allows its bundles to be replaced.

    Token counts do not count as something: a calibration that was interrupted goes on from them.
    """
    if output.exists() and not output.is_dir():
        raise VocabtrimError(f"{output} is a file: name a directory for the output")
    ours = (COUNTS_NAME, _ASIDE)  # what an interrupted or killed run leaves
    if output.is_dir() and not force and any(not path.name.startswith(ours) for path in output.iterdir()):
        raise VocabtrimError(f"{output} is not empty: choose another --output, or --force to replace its bundles")
    for name in names:
        place = output / name
        if place.exists() and not (place / MANIFEST_NAME).is_file() and (not place.is_dir() or any(place.iterdir())):
            raise VocabtrimError(f"{place} is not a bundle, so it is not replaced: move it away first")


@contextmanager
def replacing(paths: list[Path]) -> Iterator[list[Path]]:
    """Fresh directories to fill; when the block succeeds they take the places of `paths`, all of them or none.

    Each is made beside its place, so that moving it there is one rename. On any failure, Ctrl-C included, they are
    removed and the directories that were there before are as they were.
    """
    parent = paths[0].parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_ASIDE, dir=parent) as aside:
        fresh = [Path(aside) / "new" / path.name for path in paths]
        for path in fresh:
            path.mkdir(parents=True)
        yield fresh
        _put_in_place(fresh, paths, Path(aside) / "old")


def _put_in_place(fresh: list[Path], paths: list[Path], attic: Path) -> None:
    attic.mkdir()
    touched: list[tuple[Path, Path]] = []
    try:
        for new, place in zip(fresh, paths, strict=True):
            old = attic / place.name
            touched.append((place, old))
            if place.exists():
                place.rename(old)
            new.rename(place)
    except BaseException:
        for place, old in touched:
            if old.exists() or place is not touched[-1][0]:
                shutil.rmtree(place, ignore_errors=True)
            if old.exists():
                old.rename(place)
        raise
