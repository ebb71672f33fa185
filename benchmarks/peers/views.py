"""The results of `run.py`: a row for each way, a Markdown table and a plot."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bar_chart import Bar, bar_chart

Passes = Sequence[Mapping[str, Any]]


def summary(question: Mapping[str, Any], passes: Passes) -> dict[str, dict[str, Any]]:
    """Returns each way's figures by its name: medians over the passes.

    Of a pass, tokens/s and the ratio to the first way are medians over its prompts, end to end; `low` and `high` are
    the least and the greatest pass. `equal` counts the texts, of all passes, that are those of the first way with the
    same weights, of which `texts` could be compared.
    """
    return {way: _row(way, question, passes) for way in question["weights"]}


def _row(way: str, question: Mapping[str, Any], passes: Passes) -> dict[str, Any]:
    first = next(iter(question["weights"]))
    alike = next(name for name, weights in question["weights"].items() if weights == question["weights"][way])
    sets = {}
    for name in question["prompts"]:
        speeds = [_speeds(each, name, way) for each in passes]
        firsts = [_speeds(each, name, first) for each in passes]
        medians = [median(each) for each in speeds]
        ratios = [median(a / b for a, b in zip(own, its, strict=True)) for own, its in zip(speeds, firsts, strict=True)]
        sets[name] = {
            "tokens_per_second": round(median(medians), 2),
            "low": round(min(medians), 2),
            "high": round(max(medians), 2),
            "ratio": round(median(ratios), 3),
            "ratio_low": round(min(ratios), 3),
            "ratio_high": round(max(ratios), 3),
        }
    pairs = [
        (mine["tokens"], its["tokens"])
        for each in passes
        for name in question["prompts"]
        for mine, its in zip(each["replies"][name][way], each["replies"][name][alike], strict=True)
    ]
    lengths = passes[0]["first_token_seconds"]
    return {
        "sets": sets,
        "equal": sum(same_text(mine, its) for mine, its in pairs),
        "texts": len(pairs),
        "weights": question["weights"][way],
        "load_seconds": round(median(each["load_seconds"][way] for each in passes), 3),
        "first_token_seconds": {
            n: round(median(each["first_token_seconds"][n][way] for each in passes), 4) for n in lengths
        },
        "peak_megabytes": round(median(each["peak_megabytes"][way] for each in passes)),
    }


def _speeds(each: Mapping[str, Any], name: str, way: str) -> list[float]:
    """Tokens per second of each prompt."""
    return [len(reply["tokens"]) / reply["seconds"] for reply in each["replies"][name][way]]


def same_text(mine: Sequence[int], its: Sequence[int]) -> bool:
    """Programs differ in whether the token that ends a text is part of it."""
    common = min(len(mine), len(its))
    return list(mine[:common]) == list(its[:common]) and abs(len(mine) - len(its)) <= 1


def markdown(rows: Mapping[str, Mapping[str, Any]], question: Mapping[str, Any]) -> str:
    """A line for each way: tokens/s, their range and the ratio to the first way by set, then the other figures."""
    sets, lengths = list(question["prompts"]), list(next(iter(rows.values()))["first_token_seconds"])
    heads = [*sets, "equal texts", "load", *(f"first token of {length}" for length in lengths), "peak memory"]
    lines = [f"| {question['precision']} | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for way, row in rows.items():
        first = [f"{1000 * row['first_token_seconds'][length]:.0f} ms" for length in lengths]
        last = [f"{row['load_seconds']:.2f} s", *first, f"{row['peak_megabytes']} MB"]
        equal = f"{row['equal']} of {row['texts']}"
        lines.append(f"| {' | '.join([way, *(_speed(row['sets'][name]) for name in sets), equal, *last])} |")
    lines += [f"| {way} | cannot: {why} |{' |' * (len(heads) - 1)}" for way, why in question["cannot"].items()]
    return "\n".join(lines) + "\n"


def _speed(cell: Mapping[str, float]) -> str:
    return f"{cell['tokens_per_second']:.0f} ({cell['low']:.0f} to {cell['high']:.0f}), {cell['ratio']:.2f}×"


def svg(rows: Mapping[str, Mapping[str, Any]], question: Mapping[str, Any]) -> str:
    """Bars of tokens/s, a panel for each set."""
    panels = {name: [_bar(way, row["sets"][name]) for way, row in rows.items()] for name in question["prompts"]}
    return bar_chart(f"Tokens per second, {question['precision']} target", panels)


def _bar(way: str, cell: Mapping[str, float]) -> Bar:
    speed = cell["tokens_per_second"]
    return Bar(way, speed, f"{speed:.0f}", "second" if way.startswith("ours") else "first")
