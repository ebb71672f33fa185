"""The documents name only what exists: files, modules, make targets, commands and their options."""

import ast
import importlib
import re
import shlex
from itertools import takewhile
from pathlib import Path

import pytest

from vocabtrim_export.cli.main import COMMANDS, Parser, make_parser

ROOT = Path(__file__).parents[1]
PACKAGES = ("engines", "runtime", "vocabtrim_export")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
BLOCK = re.compile(r"^```(?:sh|bash|console)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
# Options of other programs that the documents name.
FOREIGN = {
    "--cuda-graph-trace",
    "--launch-count",
    "--nvtx",
    "--nvtx-capture",
    "--speculative-token-map",
    "--target-model-dir",
    "--trt",
}


def commands_in(text: str) -> list[list[str]]:
    """Returns the words of each command of ours in the blocks of a document."""
    found = []
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(("vocabtrim ", "vocabtrim-export ")) and "…" not in line:
                lexer = shlex.shlex(re.sub(r" [12]?> \S+", "", line), posix=True, punctuation_chars="|&;")
                lexer.whitespace_split = True
                found.append(list(takewhile(lambda word: word not in ("|", "&&", ";"), lexer)))
    return found


def in_code(text: str) -> list[str]:
    """Returns what stands in code quotes within a document's prose."""
    return CODE.findall(re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def options_of_ours() -> set[str]:
    """Returns every option of the commands and of the programs in this repository."""
    programs = [path for folder in ("benchmarks", "examples", "tests") for path in (ROOT / folder).rglob("*.py")]
    options = {option for path in programs for option in re.findall(r'"(--[a-z][a-z-]*)"', path.read_text())}
    return options.union(*(make_parser(name, name)._option_string_actions for name in COMMANDS))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_parse(document, monkeypatch):
    def refuse(self, message):
        raise AssertionError(message)

    monkeypatch.setattr(Parser, "error", refuse)
    for words in commands_in(document.read_text()):
        if words[0] == "vocabtrim-export":
            words = ["vocabtrim", "export", *words[1:]]
        make_parser(words[1], words[1]).parse_args(words[2:])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_a_commands_help_parses(command, monkeypatch):
    def refuse(self, message):
        raise AssertionError(message)

    monkeypatch.setattr(Parser, "error", refuse)
    parser = make_parser(command, f"vocabtrim {command}")
    example = parser.format_help().rpartition("example:\n")[2]
    assert example.startswith(f"  vocabtrim {command} ")
    assert example.count("\n") == 1  # it can be copied from a narrow terminal
    parser.parse_args(shlex.split(example)[2:])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_in_prose_exist(document):
    named = {option for code in in_code(document.read_text()) for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", code)}
    assert named <= options_of_ours() | FOREIGN


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_in_code_quotes_exist(document):
    homes = [ROOT, *(ROOT / package for package in PACKAGES)]
    for code in in_code(document.read_text()):
        if re.fullmatch(r"(?!python/sglang|vllm|tensorrt_llm|conversion)[a-z_0-9]+(/[a-z_0-9]+)+\.(py|md|json)", code):
            assert any((home / code).exists() for home in homes), code


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_in_documents_imports_what_exists(document):
    for block in re.findall(r"^```python\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in PACKAGES:
                module = importlib.import_module(node.module)
                assert not [each.name for each in node.names if not hasattr(module, each.name)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_that_documents_name_exist(document):
    modules = list((ROOT / "tests").rglob("*.py"))
    known = {path.stem for path in modules}
    known |= {name for path in modules for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert set(re.findall(r"\btest_\w+", document.read_text())) <= known


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        for target in re.findall(r"`make ([a-z-]+)`", document.read_text()):
            assert target in targets, f"{document.name}: make {target}"


def test_contributing_names_only_modules_that_exist():
    """The two lives in CONTRIBUTING.md: every word in code quotes that looks like a path is a module or a folder."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    house = text[text.index("## The house") : text.index("## A new kind")]
    homes = [ROOT, *(ROOT / package for package in PACKAGES), ROOT / "vocabtrim_export" / "lowering"]
    for name in re.findall(r"`([a-z][a-z/_0-9]*)`", house):
        found = any((home / name).is_dir() or (home / f"{name}.py").is_file() for home in homes)
        assert found or name == "engine", name
