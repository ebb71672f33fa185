"""A report in words, tables and charts: the common content of its HTML and its Markdown."""

from collections.abc import Iterator, Sequence

from engines.bundle.manifest import Manifest
from vocabtrim_export.reports.bench_sections import acceptance_section, latency_section, speed_section
from vocabtrim_export.reports.charts import Chart, Series
from vocabtrim_export.reports.coverage import Curve
from vocabtrim_export.reports.gather import ExportReport
from vocabtrim_export.reports.layout import Cell, Section, Table, megabytes
from vocabtrim_export.reports.lost_tokens import KeptTokens
from vocabtrim_export.reports.provenance import provenance_section

_CURVES_TICKS = 5


def sections(report: ExportReport) -> tuple[Section, ...]:
    """Returns the parts of the page, those without content left out."""
    parts = (
        _exported(report),
        _coverage(report),
        _lost(report),
        speed_section(report.benches),
        acceptance_section(report.benches),
        latency_section(report.benches, report.bundles.get("drafter")),
        provenance_section(report),
        Section("missing", "What this report cannot say", report.missing),
    )
    return tuple(part for part in parts if part.notes or part.charts or part.tables or part.lines)


def key_figures(report: ExportReport) -> tuple[tuple[str, str], ...]:
    """Returns the names and the values that the page begins with."""
    return tuple(_key_figures(report))


def _key_figures(report: ExportReport) -> Iterator[tuple[str, str]]:
    drafter = report.bundles.get("drafter")
    if drafter is not None:
        slots = f", {drafter.slots:,} slots" if drafter.slots else ""
        yield "Tokens kept", f"{drafter.head_rows:,} of {drafter.vocab_size:,}{slots}"
        yield "Read a draft step", megabytes(drafter.weight_bytes_per_step)
        if drafter.coverage is not None:
            yield "Coverage of held-out tokens", f"{drafter.coverage:.2%}"
    speeds = [
        row.figures.decode_speedup
        for bench in report.benches
        for row in bench.rows
        if row.is_exported and not bench.force_accepted
    ]
    if speeds:
        yield "Best measured speed-up", f"{max(speeds):.2f}×"


def _exported(report: ExportReport) -> Section:
    facts = {role: _facts(manifest) for role, manifest in report.bundles.items()}
    names = dict.fromkeys(name for each in facts.values() for name in each)
    rows = tuple((Cell(name), *(Cell(each.get(name, "–")) for each in facts.values())) for name in names)
    table = Table("The bundles", ("", *report.bundles), rows)
    return Section("exported", "What was exported", tables=(table,))


def _facts(manifest: Manifest) -> dict[str, str]:
    share = manifest.head_rows / manifest.vocab_size
    plans = manifest.tensorrt
    return {
        "Source": manifest.source,
        "Architecture": manifest.architecture,
        "Kind": manifest.kind,
        "Dtype": manifest.dtype,
        "Quantisation": manifest.quantization,
        "Rows of the LM head": f"{manifest.head_rows:,} of {manifest.vocab_size:,} ({share:.1%})",
        "In-context slots": f"{manifest.slots:,}" if manifest.slots else "none",
        "Weights read a step": megabytes(manifest.weight_bytes_per_step),
        "Of these the LM head": megabytes(manifest.head_bytes),
        "KV cache a token": f"{manifest.kv_bytes_per_token:,} bytes",
        "Context": f"{manifest.context_length:,} tokens",
        "Runs on": "ONNX Runtime" if plans is None else f"TensorRT ({plans.flavor})",
    }


def _coverage(report: ExportReport) -> Section:
    curves = report.coverage
    if not curves:
        return Section("coverage", "Coverage")
    kept = report.bundles["drafter"].head_rows
    names = [_curve_name(curve, curves) for curve in curves]
    ks = [point.rows for point in curves[0].points]
    table = Table(
        "Share of tokens that a head of K rows keeps, with its 95% interval",
        ("K", *names),
        tuple(_coverage_row(k, index, curves, kept) for index, k in enumerate(ks)),
    )
    note = (
        "Coverage bounds how often a drafted token can be right: the drafter cannot propose what its head lacks. "
        "At the K of this export a curve says what its map keeps; at other K, what the same counts would choose. "
        "Intervals of a text are over its documents. Counts do not keep documents apart: intervals of the calibration "
        "take each token by itself, and are too narrow."
    )
    sizes = tuple(
        f"{name}: {curve.tokens:,} tokens" + ("." if curve.documents is None else f" of {curve.documents:,} documents.")
        for name, curve in zip(names, curves, strict=True)
    )
    return Section("coverage", "Coverage", (note, *sizes), (_coverage_chart(curves, names, kept),), (table,))


def _coverage_chart(curves: Sequence[Curve], names: Sequence[str], kept: int) -> Chart:
    series = tuple(
        Series(
            name,
            tuple((point.rows, point.share) for point in curve.points),
            tuple((p.rows, p.low, p.high) for p in curve.points if p.low is not None and p.high is not None),
        )
        for name, curve in zip(names, curves, strict=True)
    )
    summary = f"Coverage at K = {kept:,}: " + ", ".join(
        f"{name} {next(p.share for p in curve.points if p.rows == kept):.2%}"
        for name, curve in zip(names, curves, strict=True)
    )
    ks = [point.rows for point in curves[0].points]
    return Chart(
        "Coverage by K",
        summary,
        "K",
        "share of tokens",
        series,
        tuple((k, _short(k)) for k in ks[:: max(1, -(-len(ks) // _CURVES_TICKS))]),
        is_log=True,
        is_share=True,
        mark=(kept, f"K = {kept:,}"),
    )


def _curve_name(curve: Curve, curves: Sequence[Curve]) -> str:
    alone = len([each for each in curves if each.origin == "calibration"]) == 1
    if curve.origin == "text":
        return f"text {curve.domain}"
    return "held-out calibration" if alone else f"held-out {curve.domain}"


def _coverage_row(k: int, index: int, curves: Sequence[Curve], kept: int) -> tuple[Cell, ...]:
    cells = [Cell(f"{k:,} (this export)" if k == kept else f"{k:,}", k)]
    for curve in curves:
        point = curve.points[index]
        interval = "" if point.low is None else f" ({point.low:.2%} to {point.high:.2%})"
        cells.append(Cell(f"{point.share:.2%}{interval}", point.share))
    return tuple(cells)


def _lost(report: ExportReport) -> Section:
    title = "Tokens kept and lost"
    kept = report.kept
    if kept is None:
        return Section("tokens", title, lines=report.lines)
    note = (
        f"The head keeps {kept.rows:,} tokens, of which {kept.counted:,} were counted in the calibration. It lacks "
        f"{kept.lost:,}, of which {kept.lost_counted:,} were counted: {kept.lost_share:.2%} of all counted tokens."
    )
    return Section("tokens", title, (note,), tables=_lost_table(kept), lines=report.lines)


def _lost_table(kept: KeptTokens) -> tuple[Table, ...]:
    if not kept.most_lost:
        return ()
    has_domains = any(token.domain for token in kept.most_lost)
    columns = ("Token", "Id", "Counted", "Share", *(("Mostly in",) if has_domains else ()))
    rows = tuple(
        (
            Cell(token.text, is_code=True),
            Cell(str(token.token_id), token.token_id),
            Cell(f"{token.seen:,}", token.seen),
            Cell(f"{token.share:.4%}", token.share),
            *((Cell(token.domain),) if has_domains else ()),
        )
        for token in kept.most_lost
    )
    return (Table("The most frequent tokens that the head lacks", columns, rows),)


def _short(k: int) -> str:
    return f"{k // 1024}k" if k >= 1024 and k % 1024 == 0 else f"{k:,}"
