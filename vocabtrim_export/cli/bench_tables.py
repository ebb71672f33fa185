"""The reports of `vocabtrim bench` as tables for people."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vocabtrim_export.cli.console import print_table

if TYPE_CHECKING:
    from runtime import Percentiles
    from runtime.measure.plan_measurement import PlanReport
    from runtime.measure.report import BenchReport, ModeReport
    from runtime.measure.sweep import SweepReport, SweepRow

_LISTED = 8  # the most differences shown of one mode


def show(report: "BenchReport | PlanReport | SweepReport") -> None:
    """Print a report of any kind on standard output."""
    from runtime.measure.plan_measurement import PlanReport
    from runtime.measure.report import BenchReport

    if isinstance(report, BenchReport):
        show_bench(report)
    elif isinstance(report, PlanReport):
        show_plan(report)
    else:
        show_sweep(report)


def _bench_rows(report: "BenchReport") -> "dict[str, Callable[[ModeReport], str]]":
    """Returns what each row of the table says of a way of decoding, by its name."""
    forced = report.force_accepted is not None
    return {
        "tokens/s": lambda m: f"{m.tokens_per_second:.1f}",
        "speed-up, measured": lambda m: f"{m.speedup:.2f}×",
        "speed-up, without prefills": lambda m: f"{m.decode_speedup:.2f}×",
        "speed-up, by measured latency": lambda m: _number(m.latency_speedup, "×"),
        "speed-up, memory-bound (MBSU)": lambda m: f"{m.mbsu:.2f}×",
        "block efficiency": lambda m: f"{m.block_efficiency:.2f}",
        "drafted a round": lambda m: f"{m.drafted_per_round:.2f}",
        "accepted, by position": lambda m: " ".join(f"{share:.0%}" for share in m.acceptance) or "-",
        "ms a draft step": lambda m: _number(m.draft_step_ms),
        "ms a verification (target only: a step)": lambda m: _number(m.verify_ms),
        "ms a round, p50/p90/p99": lambda m: _percentiles(m.round_percentiles_ms),
        "  of it outside the engines": lambda m: _percentiles(m.host_percentiles_ms),
        "MB read a step": lambda m: f"{m.bytes_per_step / 1e6:.1f}",
        "of the measured bandwidth": lambda m: _share(m.bandwidth_fraction),
        "coverage of held-out tokens": lambda m: "-" if m.coverage is None else f"{m.coverage:.2%}",
        "time outside the engines": lambda m: f"{m.overhead:.2%}",
        "prompts equal to target only": lambda m: "forced" if forced else f"{m.equal_prompts}/{report.prompts}",
    }


def show_bench(report: "BenchReport") -> None:
    """Print a table with a column for each way of decoding, and where their outputs differ."""
    title = (
        f"{report.prompts} prompts, {report.max_new_tokens} new tokens, {_length(report)}, "
        f"{_judged(report.force_accepted)}, medians of {report.repeats}; "
        f"memory reads {report.bandwidth / 1e9:.1f} GB/s"
    )
    modes: list[ModeReport] = list(report.modes.values())
    columns = ["", *(name.replace("_", " ") for name in report.modes)]
    print_table(title, columns, [[name, *map(value, modes)] for name, value in _bench_rows(report).items()])
    for name, mode in report.modes.items():
        if mode.collapse:
            print(f"warning, {name.replace('_', ' ')}: {mode.collapse}")
        _show_differences(name.replace("_", " "), mode)
    _show_verdict(
        [mode for name, mode in report.modes.items() if name != "target_only"], report.force_accepted is not None
    )
    if report.lossless is False:
        print("NOT LOSSLESS")


def show_sweep(report: "SweepReport") -> None:
    """Print a table with a row for each combination, and where their outputs differ."""
    settings = report.settings
    title = (
        f"{report.prompts} prompts, {settings.max_new_tokens} new tokens, {_judged(settings.force_accepted)}, "
        f"medians of {settings.repeats}; memory reads {report.bandwidth / 1e9:.1f} GB/s; speed-ups without prefills; "
        "ms as p50/p90/p99"
    )
    columns = ["drafter", "rows", "γ", "context", "tokens/s", "speed-up", "by latency", "MBSU", "τ"]
    columns += ["ms a draft step", "ms a verification", "ms a round", "MB a step", "bandwidth"]
    print_table(title, columns, [_sweep_row(row) for row in report.rows])
    for row in report.rows:
        if row.report.collapse:
            print(f"warning, {row.drafter.replace('_', ' ')} with γ = {row.draft_length}: {row.report.collapse}")
        _show_differences(f"{row.drafter.replace('_', ' ')}, γ = {row.draft_length}", row.report)
    _show_verdict([row.report for row in report.rows if row.draft_length], settings.force_accepted is not None)
    if report.lossless is not None:
        near = " but for near-ties" if any(row.report.near_ties for row in report.rows) else ""
        print(f"all outputs equal target only's{near}" if report.lossless else "NOT LOSSLESS")


def show_plan(report: "PlanReport") -> None:
    """Print the expected speed of each candidate, the fastest one, and what limits it."""
    plan = report.plan
    columns = ["drafter", "rows", "γ", "τ", "tokens/s", "speed-up"]
    rows = [
        [
            c.drafter,
            str(c.head_rows),
            str(c.draft_length),
            f"{c.block_efficiency:.2f}",
            f"{c.tokens_per_second:.1f}",
            f"{c.speedup:.2f}×",
        ]
        for c in plan.candidates
    ]
    title = f"expected, without prefills; the target alone: {plan.target_tokens_per_second:.1f} tokens/s"
    print_table(title, columns, rows)
    best = plan.best
    verdict = "speculation pays here" if plan.speculation_pays else "speculation does not pay here"
    print(
        f"{verdict}: at best {best.speedup:.2f}×, {best.drafter} ({best.head_rows} rows) "
        f"with --draft-length {best.draft_length}"
    )
    if plan.trimming_gain is not None:
        verdict = "trimming pays here" if plan.trimming_pays else "trimming does not pay here"
        print(f"{verdict}: the best trimmed drafter has {plan.trimming_gain:.2f}× the speed of the full one")
    for reason in plan.reasons:
        print(f"why not more: {reason}")


def _show_verdict(speculating: Sequence["ModeReport"], forced: bool) -> None:
    """Print whether speculation pays, where it does not, and what a verification reads of a mixture of experts.

    Args:
        speculating: The ways of decoding with drafts.
        forced: Whether acceptance was forced, so that speed-ups say nothing of it.
    """
    if not speculating:
        return
    best = max(speculating, key=lambda mode: mode.decode_speedup)
    if 0 < best.decode_speedup <= 1 and not forced:
        print(f"speculation does not pay here: at best {best.decode_speedup:.2f}× the speed of the target alone")
    if best.expert_reads:
        print(f"the target is a mixture of experts: {best.expert_reads}")


def _show_differences(name: str, report: "ModeReport") -> None:
    for verdict, found in (("different", report.differences), ("near-tie", report.near_ties)):
        for each in found[:_LISTED]:
            print(
                f"{name}, prompt {each.prompt}: {verdict} at token {each.position}, {each.found} instead of "
                f"{each.expected}, gap {each.gap:.3g}, rounding explains {each.tolerance:.3g}"
            )
        if len(found) > _LISTED:
            print(f"{name}: {len(found) - _LISTED} more, {verdict}: --json lists them")


def _sweep_row(row: "SweepRow") -> list[str]:
    report = row.report
    return [
        row.drafter.replace("_", " ") if not row.draft_length else row.drafter,
        str(row.head_rows),
        str(row.draft_length) if row.draft_length else "-",
        "-" if row.context is None else str(row.context),
        f"{report.decode_tokens_per_second:.1f}",
        f"{report.decode_speedup:.2f}×",
        _number(report.latency_speedup, "×"),
        f"{report.mbsu:.2f}×",
        f"{report.block_efficiency:.2f}",
        _percentiles(report.draft_step_percentiles_ms),
        _percentiles(report.verify_percentiles_ms),
        _percentiles(report.round_percentiles_ms),
        f"{report.bytes_per_step / 1e6:.1f}",
        _share(report.bandwidth_fraction),
    ]


def _length(report: "BenchReport") -> str:
    return f"drafts of up to {report.draft_length}" if report.adapts else f"γ = {report.draft_length}"


def _judged(force_accepted: int | str | None) -> str:
    return "greedy" if force_accepted is None else f"forced: {force_accepted} drafted tokens accepted a round"


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.2f}{unit}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _percentiles(value: "Percentiles | None") -> str:
    return "-" if value is None else "/".join(f"{ms:.3g}" for ms in (value.p50, value.p90, value.p99))
