"""The house: which package imports which, what the wheel holds, and that asking for help loads nothing heavy."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution, distributions, packages_distributions
from pathlib import Path
from subprocess import PIPE

import pytest
from packaging.requirements import Requirement

from vocabtrim_export.version import __version__

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "engines": {"engines"},
    "runtime": {"engines", "runtime"},
    "vocabtrim_export": {"engines", "runtime", "vocabtrim_export"},
}
FORBIDDEN = {
    "engines": {"torch", "transformers"},
    "runtime": {"torch", "transformers", "onnxruntime", "tensorrt"},
    "vocabtrim_export": set(),
}


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        found = imported_packages(path)
        assert found & set(MAY_IMPORT) <= MAY_IMPORT[package], path
        assert not found & FORBIDDEN[package], path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that the sdist builds."""
    place = tmp_path_factory.mktemp("dist")
    others = shutil.ignore_patterns(".*", "build", "dist", "shared", "demo", "interop")
    shutil.copytree(ROOT, place / "tree", ignore=others)
    build = "import sys, setuptools.build_meta as backend; getattr(backend, sys.argv[1])(sys.argv[2])"
    subprocess.run([sys.executable, "-c", build, "build_sdist", place], cwd=place / "tree", check=True, stdout=PIPE)
    (sdist,) = place.glob("*.tar.gz")
    shutil.unpack_archive(sdist, place)
    unpacked = place / sdist.name.removesuffix(".tar.gz")
    subprocess.run([sys.executable, "-c", build, "build_wheel", place], cwd=unpacked, check=True, stdout=PIPE)
    (wheel,) = place.glob("*.whl")
    return wheel


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert tops == set(MAY_IMPORT)
    sources = {str(path.relative_to(ROOT)) for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")}
    assert sources | {f"{package}/py.typed" for package in MAY_IMPORT} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_holds_the_repository(wheel):
    """All that is not hidden: the tests run from it, with their fixtures."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, stdout=PIPE, text=True).stdout
    tracked = {name for name in listed.split("\0") if name and not name.startswith(".")}
    (sdist,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as files:
        held = {name.partition("/")[2] for name in files.getnames()}
    assert tracked - held == set()


# Stands in for an environment that holds the wheel and what it requires: every other installed package is hidden.
_ONLY = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """bare(script, *arguments) → the finished process of a script of the installed wheel."""
    place = tmp_path_factory.mktemp("bare")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", place, wheel]
    subprocess.run(command, check=True)
    wanted = required(next(iter(distributions(path=[str(place)]))).requires)
    hidden = {top for top, owners in packages_distributions().items() if not wanted & set(map(canonical, owners))}
    assert {"torch", "transformers", "onnx_ir"} <= hidden
    assert not {"numpy", "onnxruntime", "tokenizers"} & hidden
    (place / "sitecustomize.py").write_text(_ONLY.format(hidden=hidden - set(MAY_IMPORT)))

    def run(script, *arguments):
        command = [sys.executable, place / "bin" / script, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(place)}
        return subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment)

    return run


def required(requirements):
    """The names of the distributions that `requirements` install, without extras of the wheel's own."""
    names, left = set(), [Requirement(each) for each in requirements or ()]
    while left:
        each = left.pop()
        if (each.marker and not each.marker.evaluate({"extra": ""})) or canonical(each.name) in names:
            continue
        names.add(canonical(each.name))
        left += [Requirement(text) for text in distribution(each.name).requires or ()]
    return names


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_bundles_run_with_what_the_wheel_requires(bare, pair):
    for script in ("vocabtrim", "vocabtrim-export"):
        assert bare(script, "--version").stdout == f"vocabtrim-export {__version__}\n"
    bundles = ["--target", pair.target, "--drafter", pair.drafter]
    made = bare("vocabtrim", "generate", *bundles, "--prompt", "the quick", "--max-new-tokens", "8", "--json")
    assert made.returncode == 0, made.stderr
    assert len(json.loads(made.stdout)["token_ids"]) == 8
    checked = bare("vocabtrim", "inspect", "--check", pair.drafter)
    assert checked.returncode == 0, checked.stderr


def test_an_export_without_its_extra_is_one_line(bare, tmp_path):
    asked = ["--drafter", tmp_path, "--k", "8", "--output", tmp_path / "out"]
    for done in (bare("vocabtrim-export", *asked), bare("vocabtrim", "bench", "--random-weights", "tiny")):
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "pip install 'vocabtrim-export[export]'" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["export", "--help"], ["bench", "--help"], ["--help"]])
def test_help_needs_nothing_heavy(arguments):
    code = (
        "import sys; from vocabtrim_export.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "usage: vocabtrim" in done.stdout


def test_every_program_takes_an_option_by_its_whole_name_only():
    """An abbreviation means another option as soon as there is one with the same beginning."""
    programs = [path for folder in ("benchmarks", "examples", "tests/fuzz") for path in (ROOT / folder).rglob("*.py")]
    calls = [node for path in programs for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    parsers = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "argparse.ArgumentParser"]
    assert len(parsers) > 20
    assert not [parser for parser in parsers if "allow_abbrev=False" not in parser]
