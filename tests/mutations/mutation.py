"""A row of the table."""

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass

_LAYOUT = {tokenize.COMMENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.INDENT, tokenize.NEWLINE, tokenize.NL}


@dataclass(frozen=True, slots=True)
class Mutation:
    """promise: what the project says. name: the mutation in words. tests: pytest arguments that must fail with it.

    old: code that `file` has exactly once, or that the function or class `within` has once. Where its text is not
    found, it is compared token by token: line breaks, spaces and comments may differ. new: the code that replaces it.
    """

    promise: str
    name: str
    file: str
    old: str
    new: str
    tests: str
    within: str = ""

    def apply(self, source: str) -> str:
        """Replace `old` in the text of `file`. Raises ValueError where it is not there exactly once."""
        if not self.within and source.count(self.old) == 1:
            return source.replace(self.old, self.new)
        found = list(self._find(source))
        if len(found) != 1:
            raise ValueError(f"{self.file} has the code to replace {len(found)} times")
        start, end = found[0]
        return source[:start] + self.new.strip() + source[end:]

    def _find(self, source: str) -> Iterator[tuple[int, int]]:
        """Returns where the tokens of `old` begin and end in `source`, for each occurrence."""
        wanted, tokens = [token.string for token in _tokens(self.old.strip())], list(_tokens(source))
        starts = [0]
        for line in source.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        first, last = _lines(source, self.within)
        for index in range(len(tokens) - len(wanted) + 1):
            part = tokens[index : index + len(wanted)]
            if first <= part[0].start[0] <= last and [token.string for token in part] == wanted:
                (line, column), (last_line, last_column) = part[0].start, part[-1].end
                yield starts[line - 1] + column, starts[last_line - 1] + last_column


def _tokens(source: str) -> Iterator[tokenize.TokenInfo]:
    """The tokens of code, without its layout. It may be a part of a statement."""
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type not in _LAYOUT:
                yield token
    except (tokenize.TokenError, IndentationError):  # the part ends within brackets, or in an outer block
        return


def _lines(source: str, name: str) -> tuple[int, int]:
    """The first and the last line of the function or class `name`, of all of the source where it is empty."""
    if not name:
        return 1, source.count("\n") + 1
    kinds = (ast.FunctionDef, ast.ClassDef)
    (node,) = (node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds) and node.name == name)
    return node.lineno, node.end_lineno or node.lineno
