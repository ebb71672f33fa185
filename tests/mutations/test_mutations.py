"""The rows of `make mutations` fit the code, so that it need not run for an hour to say that one does not."""

import ast

import pytest

from tests.mutations.__main__ import ALL, ROOT
from tests.mutations.mutation import Mutation


@pytest.mark.parametrize("mutation", ALL, ids=lambda mutation: mutation.name)
def test_a_row_can_be_applied_and_names_tests_that_exist(mutation):
    source = (ROOT / mutation.file).read_text("utf-8")
    broken = mutation.apply(source)
    assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(source))
    assert (ROOT / mutation.tests.partition(" -k ")[0].partition("::")[0]).exists()


def test_layout_does_not_matter_and_code_does():
    source = "def f(a, b):\n    if (  # why\n        a >=\n        b\n    ):\n        return 1\n\n"
    source += "def g(a, b):\n    return a >= b\n"
    row = Mutation("", "", "a file", "a >= b", "a > b", "", within="f")
    assert row.apply(source) == source.replace("a >=\n        b", "a > b")
    with pytest.raises(ValueError, match="a file has the code to replace 2 times"):
        Mutation("", "", "a file", "a  >=  b", "a > b", "").apply(source)
    with pytest.raises(ValueError, match="0 times"):
        Mutation("", "", "a file", "a > b", "a < b", "").apply(source)
    part = Mutation("", "", "a file", "if (a >=", "if (a <", "").apply(source)  # ends within brackets
    assert part == source.replace("if (  # why\n        a >=", "if (a <")
