"""The house: which package imports which, what the wheel holds, and that asking for help loads nothing heavy."""

import ast
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

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


def test_the_wheel_holds_the_three_packages_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert tops == set(MAY_IMPORT)
    sources = {str(path.relative_to(ROOT)) for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")}
    assert sources <= set(names)


@pytest.mark.parametrize("arguments", [["export", "--help"], ["bench", "--help"], ["--help"]])
def test_help_needs_nothing_heavy(arguments):
    code = (
        "import sys; from vocabtrim_export.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "usage: vocabtrim" in done.stdout
    assert time.perf_counter() - start < 2  # typically 0.2 s


def test_documents_name_only_files_that_exist():
    """Links between the documents, and the files that the README's commands name."""
    import re

    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_contributing_names_only_modules_that_exist():
    """The two lives in CONTRIBUTING.md: every word in code quotes that looks like a path is a module or a folder."""
    import re

    text = (ROOT / "CONTRIBUTING.md").read_text()
    house = text[text.index("## The house") : text.index("## Rules")]
    homes = [ROOT, *(ROOT / package for package in MAY_IMPORT), ROOT / "vocabtrim_export" / "lowering"]
    homes.append(ROOT / "engines")
    for name in re.findall(r"`([\w/]+)`", house):
        found = any((home / name).is_dir() or (home / f"{name}.py").is_file() for home in homes)
        assert found or name == "engine", name
