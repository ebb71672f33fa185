"""The origin of an export: calibrations, digests, files and versions."""

from collections.abc import Mapping
from typing import Any

from vocabtrim_export.reports.gather import ExportReport
from vocabtrim_export.reports.layout import Cell, Section, Table

# Fields of a `CalibrationRun` and their names on the page.
_RUN = {
    "domain": "Domain",
    "source": "Counted",
    "corpus": "Corpus",
    "tokens": "Tokens",
    "weight": "Weight",
    "temperature": "Temperature",
    "seed": "Seed",
    "dtype": "Dtype",
    "model_digest": "Model",
    "corpus_digest": "Corpus digest",
}


def provenance_section(report: ExportReport) -> Section:
    """Returns the part of the page about the origin of everything."""
    tables = [_runs(each.calibration) for each in report.bundles.values() if each.calibration]
    tables += [_digests(report), _files(report), _versions(report)]
    note = f"Made by vocabtrim-export {report.version}. Every file had the digest that its manifest states."
    return Section("provenance", "Provenance", (note,), tables=tuple(table for table in tables if table.rows))


def _runs(calibration: Mapping[str, Any]) -> Table:
    runs = [each for each in calibration.get("runs", ()) if isinstance(each, dict)]
    names = [name for name in _RUN if any(run.get(name) not in (None, "", 0) for run in runs)]
    rows = tuple((Cell(str(number)), *(_cell(run.get(name)) for name in names)) for number, run in enumerate(runs, 1))
    return Table("Calibrations that chose the kept tokens", ("Run", *(_RUN[name] for name in names)), rows)


def _digests(report: ExportReport) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for role, manifest in report.bundles.items():
        counts = (manifest.calibration or {}).get("digest")
        digests = {
            "manifest": report.digests[role],
            "weights of the source": manifest.source_digest,
            "tokenizer": manifest.tokenizer,
            "LM head": manifest.head,
            "kept tokens": manifest.vocab_map,
            "token counts": counts,
        }
        rows += [(Cell(f"{role}, {name}"), Cell(str(each), is_code=True)) for name, each in digests.items() if each]
    return Table("Digests (sha256)", ("What", "Digest"), tuple(rows))


def _files(report: ExportReport) -> Table:
    rows = tuple(
        (Cell(f"{role}/{name}"), Cell(f"{file.bytes:,}", file.bytes), Cell(file.sha256, is_code=True))
        for role, manifest in report.bundles.items()
        for name, file in sorted(manifest.files.items())
    )
    return Table("Files", ("File", "Bytes", "sha256"), rows)


def _versions(report: ExportReport) -> Table:
    tools = dict.fromkeys(name for each in report.bundles.values() for name in each.tool_versions)
    rows = tuple(
        (Cell(name), *(Cell(each.tool_versions.get(name, "–")) for each in report.bundles.values())) for name in tools
    )
    return Table("Versions that wrote the bundles", ("Package", *report.bundles), rows)


def _cell(value: object) -> Cell:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(f"{value:,}", value)
    return Cell("–" if value in (None, "") else str(value))
