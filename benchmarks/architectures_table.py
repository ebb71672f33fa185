"""The table of docs/models.md, out of the rows of `architectures.py`."""

import re
from pathlib import Path
from typing import Any

MARKS = "<!-- architectures -->", "<!-- /architectures -->"
HEADINGS = {
    "different": "Different",
    "crash": "Failed",
    "not built": "Not built by transformers from a small configuration",
    "not run": "Not run",
}


def table(rows: dict[str, Any], names: list[str]) -> str:
    """Markdown: the equal ones of the architectures `names`, then the refused ones by their cause, then the rest."""
    equal = sorted(name for name, row in rows.items() if row["status"] == "equal")
    worst = max(rows[name]["logit_error"] for name in equal)
    lines = [
        f"**{len(equal)} equal** (greedy tokens alone and as a pair, and logits to {worst:.0e} of their deviation): "
        + ", ".join(f"`{name}`" for name in equal),
        "",
        "| refused because | architectures |",
        "|---|---|",
    ]
    causes: dict[str, list[str]] = {}
    for name, row in sorted(rows.items()):
        if row["status"] == "refused":
            causes.setdefault(_cause(row["reason"]), []).append(f"`{name}`")
    lines += [f"| {cause} | {', '.join(many)} |" for cause, many in sorted(causes.items(), key=lambda c: -len(c[1]))]
    status = {name: rows[name]["status"] if name in rows else "not run" for name in names}
    for kind, heading in HEADINGS.items():
        many = [f"`{name}`" for name in sorted(names) if status[name] == kind]
        if many:
            lines += ["", f"**{heading} ({len(many)}):** {', '.join(many)}"]
    return "\n".join(lines)


def _cause(reason: str) -> str:
    """The refusal without the model's own name and without the advice at its end."""
    text = re.sub(r"^MODEL( \([^)]*\))? (is )?", "", reason)
    text = re.sub(r"^(a|an) (\S+) model cannot be exported: its code( \([^)]*\))?", "its code", text)
    return text.partition(";")[0].replace("MODEL", "it").replace("|", "\\|")


def write_document(path: Path, text: str) -> None:
    before, _, rest = path.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    path.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")
