"""The results of benches as parts of a report's page."""

from collections.abc import Sequence

from engines.bundle.manifest import Manifest
from vocabtrim_export.reports.benches import Bench, Measured
from vocabtrim_export.reports.charts import Chart, Series, nice_ticks
from vocabtrim_export.reports.layout import Cell, Section, Table, megabytes


def speed_section(benches: Sequence[Bench]) -> Section:
    """Returns the part about speed-ups."""
    rows = [(bench, row) for bench in benches if not bench.force_accepted for row in bench.rows]
    drafted = [(bench, row) for bench, row in rows if row.draft_length]
    columns = ("Way", "Bench", "Tokens/s", "Measured", "By measured steps", "Memory-bound", "Tokens a round")
    table = Table("Speed-up over the target alone, without prefills", columns, tuple(_speed_row(*row) for row in rows))
    notes = tuple(_bench_note(bench) for bench in benches)
    notes += (
        "By measured steps: what the times of a draft step and of a verification predict at the measured acceptance. "
        "Memory-bound: what the bytes that they read predict (MBSU).",
    ) * bool(rows)
    charts = (_speed_chart(drafted),) if drafted else ()
    return Section("speed", "Speed-up, predicted and measured", notes, charts, (table,) if rows else ())


def acceptance_section(benches: Sequence[Bench]) -> Section:
    """Returns the part about acceptance by position, a line for each bench, such as a domain, and drafter."""
    longest: dict[tuple[str, str, int | None], Measured] = {}
    for bench in benches:
        for row in bench.rows:
            key = bench.name, row.mode, row.context
            is_longer = key not in longest or row.draft_length > longest[key].draft_length
            if row.figures.acceptance and not bench.force_accepted and is_longer:
                longest[key] = row
    if not longest:
        return Section("acceptance", "Acceptance")
    named = {f"{bench}: {row.way}": row.figures.acceptance for (bench, _, _), row in longest.items()}
    positions = range(1, max(map(len, named.values())) + 1)
    table = Table(
        "Share of drafts in which so many tokens were accepted, of those that drafted as many",
        ("Tokens", *named),
        tuple((Cell(str(at), at), *(_share(each, at) for each in named.values())) for at in positions),
    )
    first = ", ".join(f"{name} {each[0]:.0%}" for name, each in named.items())
    chart = Chart(
        "Acceptance by position in the draft",
        f"First drafted tokens that are accepted: {first}",
        "position in the draft",
        "share accepted",
        tuple(Series(name, tuple(enumerate(each, 1))) for name, each in named.items()),
        tuple((at, str(at)) for at in positions),
        is_share=True,
    )
    return Section("acceptance", "Acceptance by position and domain", charts=(chart,), tables=(table,))


def latency_section(benches: Sequence[Bench], drafter: Manifest | None) -> Section:
    """Returns the part about the time of a draft step by K, against what memory allows."""
    steps = [(bench, row) for bench in benches for row in bench.rows if row.draft_length and row.figures.draft_step_ms]
    if not steps:
        return Section("latency", "Latency")
    columns = ("Drafter", "Bench", "K", "Draft step", "Read a step", "Memory limit", "Of the limit")
    table = Table("Time of a draft step (median)", columns, tuple(_latency_row(*step) for step in steps))
    measured = sorted({(row.head_rows, row.figures.draft_step_ms or 0.0) for _, row in steps})
    limits = _limits(steps, drafter)
    ticks = dict.fromkeys([*(k for k, _ in limits), *(k for k, _ in measured)])
    chart = Chart(
        "Draft step by K",
        ", ".join(f"{ms:.2f} ms with {k:,} rows" for k, ms in measured),
        "K",
        "ms a draft step",
        (
            Series("measured", tuple(measured), is_line=False),
            Series("limit: bytes over the memory's bandwidth", limits, has_marks=False),
        ),
        tuple((k, f"{k:,}") for k in sorted(ticks)[:: max(1, -(-len(ticks) // 4))]),
        mark=(drafter.head_rows, f"K = {drafter.head_rows:,}") if drafter else None,
    )
    return Section("latency", "Latency by K against the bandwidth limit", charts=(chart,), tables=(table,))


def _limits(steps: Sequence[tuple[Bench, Measured]], drafter: Manifest | None) -> tuple[tuple[float, float], ...]:
    """Returns the limit in ms by K.

    It is the exported drafter's at other K, where that was measured, or each drafter's own.
    """
    own = next((step for step in steps if step[1].is_exported), None)
    if own is None or drafter is None or not own[0].bandwidth:
        return tuple(sorted({(float(row.head_rows), row.limit_ms) for _, row in steps}))
    bench, row = own
    row_bytes = drafter.head_bytes / (drafter.head_rows + drafter.slots)
    ks = sorted({drafter.head_rows, drafter.vocab_size, *(each.head_rows for _, each in steps)})
    start = max(1, drafter.head_rows // 4)
    return tuple(
        (float(k), 1e3 * (row.figures.bytes_per_step + row_bytes * (k - drafter.head_rows)) / bench.bandwidth)
        for k in sorted({start, *ks})
    )


def _bench_note(bench: Bench) -> str:
    repeats = "one repeat" if bench.repeats == 1 else f"medians of {bench.repeats} repeats"
    equal = {True: "all outputs were the target's own", False: "OUTPUTS DIFFERED", None: "acceptance was forced"}
    return (
        f"{bench.name}: {bench.prompts} prompts of {bench.max_new_tokens} new tokens, {repeats}, "
        f"{bench.cpu} ({bench.cores} cores), memory reads {bench.bandwidth / 1e9:.1f} GB/s; "
        f"{equal[bench.lossless]}."
    )


def _speed_row(bench: Bench, row: Measured) -> tuple[Cell, ...]:
    figures = row.figures
    return (
        Cell(row.way + (" (this export)" if row.is_exported else "")),
        Cell(bench.name),
        Cell(f"{figures.tokens_per_second:.1f}", figures.tokens_per_second),
        _times(figures.decode_speedup),
        _times(figures.latency_speedup),
        _times(figures.mbsu),
        Cell(f"{figures.block_efficiency:.2f}", figures.block_efficiency),
    )


def _speed_chart(rows: Sequence[tuple[Bench, Measured]]) -> Chart:
    figures = [row.figures for _, row in rows]
    by_steps = sorted((each.latency_speedup, each.decode_speedup) for each in figures if each.latency_speedup)
    by_bytes = sorted((each.mbsu, each.decode_speedup) for each in figures)
    ticks = nice_ticks(0, max(max(each) for each in [*by_steps, *by_bytes]))
    equal = ((ticks[0], ticks[0]), (ticks[-1], ticks[-1]))
    best = max(each.decode_speedup for each in figures)
    return Chart(
        "Predicted and measured speed-up",
        f"The best measured speed-up is {best:.2f} times the target alone. Points on the line are as predicted",
        "predicted speed-up",
        "measured speed-up",
        (
            Series("by measured steps", tuple(by_steps), is_line=False),
            Series("memory-bound (MBSU)", tuple(by_bytes), is_line=False),
            Series("as predicted", equal, has_marks=False),
        ),
        tuple((tick, f"{tick:g}×") for tick in ticks),
    )


def _latency_row(bench: Bench, row: Measured) -> tuple[Cell, ...]:
    step = row.figures.draft_step_ms or 0.0
    share = row.limit_ms / step if step else 0.0
    return (
        Cell(row.way + (" (this export)" if row.is_exported else "")),
        Cell(bench.name),
        Cell(f"{row.head_rows:,}", row.head_rows),
        Cell(f"{step:.2f} ms", step),
        Cell(megabytes(row.figures.bytes_per_step), row.figures.bytes_per_step),
        Cell(f"{row.limit_ms:.2f} ms", row.limit_ms),
        Cell(f"{share:.0%}", share),
    )


def _share(shares: Sequence[float], position: int) -> Cell:
    return Cell(f"{shares[position - 1]:.1%}", shares[position - 1]) if position <= len(shares) else Cell("–")


def _times(value: float | None) -> Cell:
    return Cell("–") if value is None else Cell(f"{value:.2f}×", value)
