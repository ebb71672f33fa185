"""Files that benchmarks are given by name, and files that they write."""

from pathlib import Path


def named(text: str) -> tuple[str, Path]:
    """Parse NAME=FILE."""
    name, _, path = text.partition("=")
    return name, Path(path)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, "utf-8")
    aside.replace(path)
