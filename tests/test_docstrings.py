"""Docstrings describe parameters and fields in Google's sections, which help() and editors show."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("engines", "runtime", "vocabtrim_export")
SECTIONS = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):$", re.MULTILINE)


def described_in_prose(source: str) -> list[str]:
    """Returns "line name: parameters" of each function and class that describes some as "name: text" in its prose."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if isinstance(node, ast.ClassDef):
            names = [each.target.id for each in node.body if isinstance(each, ast.AnnAssign)]
        else:
            names = [each.arg for each in (*node.args.args, *node.args.kwonlyargs)]
        prose = SECTIONS.split(ast.get_docstring(node) or "")[0]
        described = [name for name in names if re.search(rf"(^|[.;\n]\s*){name}: ", prose)]
        if described:
            lines.append(f"{node.lineno} {node.name}: {', '.join(described)}")
    return lines


@pytest.mark.parametrize("package", PACKAGES)
def test_parameters_and_fields_are_described_in_sections(package):
    paths = sorted((ROOT / package).rglob("*.py"))
    assert len(paths) > 20
    assert not [f"{path}:{line}" for path in paths for line in described_in_prose(path.read_text("utf-8"))]


NOUNS = re.compile(r"(The|A|An|All|Every|Each|None|Whether|Tokens|Rows|Bytes|Milliseconds|`)\b")


def without_verb(source: str) -> list[str]:
    """Returns "line name" of each function, properties apart, whose docstring is no sentence about what it does."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    functions = [node for node in functions if "property" not in " ".join(map(ast.unparse, node.decorator_list))]
    return [f"{node.lineno} {node.name}" for node in functions if NOUNS.match(ast.get_docstring(node) or "")]


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_say_what_they_do(package):
    found = {str(path): without_verb(path.read_text("utf-8")) for path in (ROOT / package).rglob("*.py")}
    assert not {path: lines for path, lines in found.items() if lines}


def test_prose_descriptions_are_recognised():
    assert described_in_prose('class A:\n    """A thing. x: its size."""\n    x: int') == ["1 A: x"]
    assert described_in_prose('def f(y):\n    """Do it.\n\n    y: how.\n    """') == ["1 f: y"]
    assert not described_in_prose('def f(y):\n    """Do it.\n\n    Args:\n        y: how.\n    """')
