"""A row of the table."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutation:
    """promise: what the project says. name: the mutation in words. tests: pytest arguments that must fail with it.

    old: a text that `file` has exactly once. new: what replaces it.
    """

    promise: str
    name: str
    file: str
    old: str
    new: str
    tests: str
