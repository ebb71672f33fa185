"""`make mutations`: break the code on purpose, one promise at a time, and see that a test notices.

Each mutation is a row of data: the promise, the file, the code that is replaced (found exactly once), what replaces it,
and the tests that must then fail. They run in a copy of the tree. The table of what failed is `docs/trust.md`, below
its mark; `python -m tests.mutations NAME…` runs some and leaves the other rows as they are. Exits with 1 if nothing
noticed one of them.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutations.calibration import CALIBRATION
from tests.mutations.constraints import CONSTRAINTS
from tests.mutations.conversations import CONVERSATIONS
from tests.mutations.decoding import DECODING
from tests.mutations.device import DEVICE
from tests.mutations.files import FILES
from tests.mutations.formats import FORMATS
from tests.mutations.load import LOAD
from tests.mutations.mutation import Mutation
from tests.mutations.proof import PROOF
from tests.mutations.reports import REPORTS
from tests.mutations.server import SERVER

ALL = (
    *FILES,
    *DECODING,
    *LOAD,
    *FORMATS,
    *DEVICE,
    *CONVERSATIONS,
    *PROOF,
    *REPORTS,
    *SERVER,
    *CALIBRATION,
    *CONSTRAINTS,
)
ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "trust.md"
MARK = "<!-- written by `make mutations` -->\n"
NOT_NOTICED = "NOT NOTICED"
_LEFT_OUT = (".git", ".venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", "demo", "interop", "shared")
_MOST_SECONDS = 900  # a hang is a failure too, but none that names a test


def run(mutation: Mutation) -> str:
    """Returns what failed with the mutation, or why nothing did."""
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        file = tree / mutation.file
        try:
            file.write_text(mutation.apply(file.read_text("utf-8")), "utf-8")
        except ValueError as error:
            return f"{NOT_NOTICED}: {error}"
        path, _, expression = mutation.tests.partition(" -k ")
        command = [sys.executable, "-m", "pytest", "--tb=no", "-p", "no:cacheprovider"]
        command += ["--hypothesis-profile", "unshrunk", path]
        command += ["-k", expression] if expression else []
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        try:
            done = subprocess.run(
                command, cwd=tree, env=environment, capture_output=True, text=True, timeout=_MOST_SECONDS
            )
        except subprocess.TimeoutExpired:
            return f"{NOT_NOTICED}: the tests did not end in {_MOST_SECONDS} s"
    failed = re.findall(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if not failed:
        return f"{NOT_NOTICED}: {' '.join(done.stdout.split())[-80:]}"
    return f"`{failed[0]}`" + (f" and {len(failed) - 1} more" if len(failed) > 1 else "")


def main() -> int:
    wanted = set(sys.argv[1:])
    chosen = [each for each in ALL if not wanted or each.name in wanted]
    if unknown := wanted - {each.name for each in chosen}:
        print(f"no such mutation: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    results: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=2) as pool:
        for mutation, noticed in zip(chosen, pool.map(run, chosen), strict=True):
            print(f"{mutation.name}: {noticed}", flush=True)
            results[_begin(mutation)] = noticed
    missed = sum(noticed.startswith(NOT_NOTICED) for noticed in results.values())
    print(f"{len(results)} mutations, {missed} not noticed")
    write_table(results)
    return 1 if missed else 0


def write_table(results: Mapping[str, str]) -> None:
    """Write what noticed each mutation, by the begin of its row. The rows of those that did not run stay."""
    text, _, table = TABLE.read_text("utf-8").partition(MARK)
    lines = table.splitlines(keepends=True)
    rows = ["| promise | what was broken | what noticed |\n", "| --- | --- | --- |\n"]
    for begin in map(_begin, ALL):
        before = [line for line in lines if line.startswith(begin)]
        rows += [f"{begin}{results[begin]} |\n"] if begin in results else before
    TABLE.write_text(text + MARK + "".join(rows), "utf-8")


def _begin(mutation: Mutation) -> str:
    return f"| {mutation.promise} | {mutation.name} | "


if __name__ == "__main__":
    sys.exit(main())
