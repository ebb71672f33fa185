"""`make mutations`: break the code on purpose, one promise at a time, and see that a test notices.

Each mutation is a row of data: the promise, the file, the text that is replaced (found exactly once), what replaces it,
and the tests that must then fail. They run in a copy of the tree. The table of what failed is `docs/trust.md`, below
its mark; `python -m tests.mutations NAME…` runs some and writes nothing.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "trust.md"
MARK = "<!-- written by `make mutations` -->\n"
_LEFT_OUT = (".git", ".venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", "demo", "shared")


@dataclass(frozen=True, slots=True)
class Mutation:
    """promise: what the project says. name: the mutation in words. tests: pytest arguments that must fail with it."""

    promise: str
    name: str
    file: str
    old: str
    new: str
    tests: str


BUNDLE, TRUST, FAULTS = (
    "tests/engines/test_bundle.py",
    "tests/integration/test_trust.py",
    "tests/integration/test_faults.py",
)
CHECKS, COMMIT, COUNTS = "engines/checks.py", "engines/commit.py", "vocabtrim_export/calibration/counts.py"

MUTATIONS = (
    Mutation(
        "A changed byte of any file is refused at load, by name",
        "digests of files are not compared",
        CHECKS,
        "if file_digest(path) != stated.sha256:",
        "if False:",
        f"{TRUST} -k broken_bundle",
    ),
    Mutation(
        "A truncated file is refused as such",
        "sizes of files are not compared",
        CHECKS,
        "if size != stated.bytes:",
        "if False:",
        f"{TRUST} -k truncated",
    ),
    Mutation(
        "An edited manifest is refused",
        "the manifest's own digest is not compared",
        "engines/manifest.py",
        'if data.pop("digest", None) != _digest(data):',
        'if data.pop("digest", None) is None:',
        f"{BUNDLE} -k edited",
    ),
    Mutation(
        "A newer format version is refused by name",
        "newer versions are read",
        "engines/manifest.py",
        "if version > FORMAT_VERSION:",
        "if False:",
        f"{BUNDLE} -k cannot_be",
    ),
    Mutation(
        "A swapped map is refused though all file digests fit",
        "the map is not compared with the manifest",
        CHECKS,
        "if found != (manifest.vocab_map, manifest.head_rows, manifest.vocab_size):",
        "if False:",
        f"{TRUST} -k belong",
    ),
    Mutation(
        "A swapped tokenizer of the same size is refused though all file digests fit",
        "the tokenizer's table is not compared",
        CHECKS,
        "if Tokenizer.load(root).digest != manifest.tokenizer:",
        "if False:",
        f"{TRUST} -k belong",
    ),
    Mutation(
        "A graph belongs to one map, tokenizer, head and model",
        "the graph's metadata is not compared",
        CHECKS,
        "if metadata.get(key) != wanted:",
        "if False:",
        f"{TRUST} -k belong",
    ),
    Mutation(
        "The table inside the graph is the map beside it",
        "the baked table is not read",
        CHECKS,
        "if vocab_map and not np.array_equal(",
        "if vocab_map and False and not np.array_equal(",
        f"{TRUST} -k belong",
    ),
    Mutation(
        "`inspect --check` finds other head rows though all file digests fit",
        "the head's rows are not hashed",
        CHECKS,
        "if graph.digest(graph.head_tensors()) != manifest.head:",
        "if False:",
        f"{TRUST} -k head_rows",
    ),
    Mutation(
        "Names in a manifest stay in the bundle",
        "a manifest's names are not looked at",
        CHECKS,
        "if not is_plain_name(name):",
        "if False:",
        f"{BUNDLE} -k cannot_be",
    ),
    Mutation(
        "Links out of the bundle are refused",
        "links are followed anywhere",
        CHECKS,
        "if path.resolve().parent != root.resolve():",
        "if False:",
        f"{BUNDLE} -k links",
    ),
    Mutation(
        "A file put beside a bundle is not read",
        "added files are not looked for",
        CHECKS,
        "if name not in manifest.files and (root / name).exists():",
        "if False:",
        f"{BUNDLE} -k beside",
    ),
    Mutation(
        "Weights outside the bundle are not opened",
        "locations in the graph are not looked at",
        "engines/graph_file.py",
        "if not isinstance(name, str) or not is_plain_name(name):",
        "if not isinstance(name, str):",
        f"{TRUST} -k outside",
    ),
    Mutation(
        "The same inputs give the same bytes",
        "the manifest says when it was written",
        "vocabtrim_export/bundle_writer.py",
        "tool_versions={tool: version(tool) for tool in _TOOLS}",
        'tool_versions={tool: version(tool) for tool in _TOOLS} | {"at": str(__import__("time").time_ns())}',
        f"{TRUST} -k same_bytes",
    ),
    Mutation(
        "Token counts that were changed are refused",
        "their digest is not compared",
        COUNTS,
        "provenance.sha256 != counts._sha256()",
        "False",
        "tests/vocabtrim_export/test_counts.py -k changed",
    ),
    Mutation(
        "A killed export leaves the old pair or the new one",
        "bundles take their places before the commit mark",
        COMMIT,
        "        _write_mark(directory, aside, names)\n        _forward(directory, aside, names)\n",
        "        _forward(directory, aside, names)\n        _write_mark(directory, aside, names)\n",
        f"{FAULTS} -k again",
    ),
    Mutation(
        "A killed export is finished by whoever reads it",
        "readers do not look for a commit mark",
        "engines/bundle.py",
        "    finish_if_free(root.absolute().parent)\n",
        "",
        f"{FAULTS} -k fresh",
    ),
    Mutation(
        "A killed calibration goes on and counts nothing twice",
        "counts are written in place",
        "vocabtrim_export/output.py",
        'aside = path.with_name(f"{ASIDE}{path.name}.{os.getpid()}")',
        "aside = path",
        f"{FAULTS} -k calibration",
    ),
    Mutation(
        "What a killed run left does not stay",
        "leftovers are not cleared",
        "vocabtrim_export/output.py",
        "            _clear(directory)\n",
        "",
        f"{FAULTS} -k fresh",
    ),
    Mutation(
        "Two exports into one place: the second is told so",
        "the lock is not taken",
        COMMIT,
        "is_free = _flock(descriptor)",
        "is_free = True",
        f"{TRUST} -k second_export",
    ),
    Mutation(
        "Nothing is unpickled: a pickle checkpoint is refused with the way to convert it",
        "pickles are not refused",
        "vocabtrim_export/weight_files.py",
        'PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")',
        "PICKLES = ()",
        "tests/integration/test_mistakes.py -k missing_or_wrong",
    ),
    Mutation(
        "No model's own code runs",
        "remote code is allowed",
        "vocabtrim_export/models.py",
        'options["trust_remote_code"] = False',
        'options["trust_remote_code"] = True',
        "tests/vocabtrim_export/test_weight_files.py -k own_code",
    ),
    Mutation(
        "Claims of a GGUF header are checked before anything is allocated",
        "lengths in a GGUF are believed",
        "vocabtrim_export/gguf_header.py",
        "if length > min(most, self.left()):",
        "if False:",
        "tests/vocabtrim_export/test_weight_files.py",
    ),
    Mutation(
        "A model that a config.json makes too large is refused before it is allocated",
        "its size is not compared with the weights",
        "vocabtrim_export/models.py",
        "if wanted > _MOST_RATIO * weights:",
        "if False:",
        "tests/vocabtrim_export/test_weight_files.py",
    ),
    Mutation(
        "A line of JSONL of absurd length is refused by its number",
        "lines of any length are read",
        "vocabtrim_export/calibration/corpus.py",
        "if len(line) > MAX_LINE:",
        "if False:",
        "tests/vocabtrim_export/test_corpus.py -k absurd",
    ),
    Mutation(
        "A head drafts what its recurrence gives on the target's features",
        "accepted drafts keep the head's own rows",
        "runtime/reading.py",
        "self.drafter.rewind(self.rows)",
        "self.drafter.rewind(min(self.drafter.length, length))",
        "tests/integration/test_eagle.py::test_drafts_are_the_recurrence_after_any_number_of_accepted_ones[2]",
    ),
    Mutation(
        "A head runs only with a target that gives the features it reads",
        "features are not compared",
        "runtime/pair.py",
        "if drafter.features_read:",
        "if False:",
        "tests/integration/test_eagle.py::test_only_a_target_that_gives_the_features_goes_with_a_head",
    ),
    Mutation(
        "A head in any trainer's layout is the same head",
        "layers of `eagle_config` are counted as those at the top",
        "vocabtrim_export/eagle/config.py",
        "tuple(layer + 1 for layer in given)",
        "tuple(given)",
        "tests/integration/test_eagle.py::test_every_layout_holds_the_same_head",
    ),
    Mutation(
        "A d2t that names no K different tokens is refused",
        "tokens that a d2t names twice are not noticed",
        "vocabtrim_export/eagle/vocabulary.py",
        "if len(np.unique(ids)) < rows:",
        "if False:",
        "tests/integration/test_eagle_mistakes.py::test_tensors_that_cannot_be[twice]",
    ),
    Mutation(
        "Readers of anyone's files raise nothing but one line",
        "half surrogate pairs pass for text",
        "engines/typed_json.py",
        'return isinstance(value, str) and not any("\\ud800" <= letter <= "\\udfff" for letter in value)',
        "return isinstance(value, str)",
        "tests/fuzz",
    ),
)


def run(mutation: Mutation) -> list[str]:
    """The tests that fail with it. Raises where its text is not found, or nothing fails."""
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        file = tree / mutation.file
        text = file.read_text("utf-8")
        if text.count(mutation.old) != 1:
            raise SystemExit(f"{mutation.name}: {mutation.file} has its text {text.count(mutation.old)} times")
        file.write_text(text.replace(mutation.old, mutation.new), "utf-8")
        command = [sys.executable, "-m", "pytest", "--tb=no", "-p", "no:cacheprovider", *_split(mutation.tests)]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    failed = re.findall(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if not failed:
        raise SystemExit(f"{mutation.name}: nothing failed\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed


def _split(tests: str) -> list[str]:
    path, _, expression = tests.partition(" -k ")
    return [path, "-k", expression] if expression else [path]


def main() -> None:
    wanted = set(sys.argv[1:])
    chosen = [mutation for mutation in MUTATIONS if not wanted or mutation.name in wanted]
    rows = []
    with ThreadPoolExecutor(max_workers=2) as pool:
        for mutation, failed in zip(chosen, pool.map(run, chosen), strict=True):
            shown = f"`{failed[0]}`" + (f" and {len(failed) - 1} more" if len(failed) > 1 else "")
            print(f"{mutation.name}: {shown}", flush=True)
            rows.append(f"| {mutation.promise} | {mutation.name} | {shown} |")
    if not wanted:
        before = TABLE.read_text("utf-8").partition(MARK)[0]
        header = "| promise | what was broken | what noticed |\n| --- | --- | --- |\n"
        TABLE.write_text(before + MARK + header + "\n".join(rows) + "\n", "utf-8")


if __name__ == "__main__":
    main()
