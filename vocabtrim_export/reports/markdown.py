"""A report as Markdown (GitHub's), without its charts."""

import re

from vocabtrim_export.reports.gather import ExportReport
from vocabtrim_export.reports.layout import Cell, Section, Table
from vocabtrim_export.reports.lost_tokens import MarkedLine
from vocabtrim_export.reports.sections import key_figures, sections


def to_markdown(report: ExportReport) -> str:
    """Returns the report's words and tables. Text is escaped, so that it is shown as it is."""
    figures = [f"- {_escape(name)}: **{_escape(value)}**" for name, value in key_figures(report)]
    parts = [f"# Export {_escape(report.name)}", "\n".join(figures), *map(_section, sections(report))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> str:
    notes = [_escape(note) for note in section.notes]
    lines = [_line(line) for line in section.lines]
    parts = [f"## {_escape(section.title)}", *notes, *map(_table, section.tables), "\n".join(lines)]
    return "\n\n".join(part for part in parts if part)


def _table(table: Table) -> str:
    head = f"| {' | '.join(map(_escape, table.columns))} |"
    rule = f"|{'|'.join('---' for _ in table.columns)}|"
    rows = [f"| {' | '.join(map(_cell, row))} |" for row in table.rows]
    return "\n".join((f"**{_escape(table.caption)}**", "", head, rule, *rows))


def _cell(cell: Cell) -> str:
    return _escape(cell.text)


def _line(line: MarkedLine) -> str:
    shown = "".join(f"**{_escape(text)}**" if is_lost else _escape(text) for text, is_lost in line.parts)
    return f"- {_escape(line.domain)}, {line.lost} of {line.tokens} tokens lost: {shown}"


def _escape(text: str) -> str:
    """Returns the text in one line, with a backslash before characters that Markdown or HTML would interpret."""
    return re.sub(r"([\\`*_\[\]<>|~&#$])", r"\\\1", " ".join(text.split("\n")))
