"""Progress for people: bars on a terminal, plain lines elsewhere. All of it on standard error."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from vocabtrim_export.progress import Progress

# The units of tasks whose speed is shown, by the first word of their names.
RATES = {"calibrate": "tokens", "load": "MB", "write": "MB"}
_SECONDS_BETWEEN_LINES = 15.0
# The share of a task from which on its speed tells the remaining time: a calibration reads 64 prompts before its first
# token, and would announce days.
_KNOWN_SHARE = 0.02


@contextmanager
def progress_reporter(rates: dict[str, str] | None = None) -> Iterator[Progress]:
    """Yield `report(task, done, total)`.

    Args:
        rates: The unit of each task whose speed is worth showing, such as {"calibrate": "tokens"}.
    """
    if sys.stderr.isatty():
        with _bars(rates or {}) as report:
            yield report
    else:
        yield _lines(rates or {})


@contextmanager
def _bars(rates: dict[str, str]) -> Iterator[Progress]:
    from rich import progress as rich_progress
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:<16}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn()
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}
        speed = _Speed(rates)

        def report(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bars.add_task(task, note="")
            bars.update(tasks[task], completed=done, total=total, note=f"{done}/{total}{speed(task, done, total)}")

        yield report


def _lines(rates: dict[str, str]) -> Progress:
    """Print a line for a task at its first report, then every 15 seconds, and when it is done."""
    last: dict[str, float] = {}
    complete: set[str] = set()
    speed = _Speed(rates)

    def report(task: str, done: int, total: int) -> None:
        now = monotonic()
        note = speed(task, done, total)
        finished = done >= total and task not in complete
        if finished:
            complete.add(task)
        if finished or now - last.get(task, -_SECONDS_BETWEEN_LINES) >= _SECONDS_BETWEEN_LINES:
            last[task] = now
            print(f"{task}: {done}/{total}{note}", file=sys.stderr, flush=True)

    return report


class _Speed:
    """A task's speed since its first report, so that an earlier run's work does not count, and the remaining time."""

    def __init__(self, units: dict[str, str]) -> None:
        self.units = units
        self.began: dict[str, tuple[float, int]] = {}

    def __call__(self, task: str, done: int, total: int) -> str:
        start, already = self.began.setdefault(task, (monotonic(), done))
        seconds = monotonic() - start
        unit = self.units.get(task.partition(" ")[0])
        if unit is None or seconds < 1:
            return ""
        speed = (done - already) / seconds
        if not speed:
            return ""
        is_known = done - already >= _KNOWN_SHARE * total and done < total
        left = f", {_duration((total - done) / speed)} left" if is_known else ""
        return f", {speed:.{1 if speed < 10 else 0}f} {unit}/s{left}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if seconds >= 60 else f"{seconds:.0f} s"


def print_table(title: str, columns: list[str], rows: list[list[str]], numbers: bool = True) -> None:
    """Print a table on standard output.

    Args:
        title: Stands above the table.
        columns: The columns' heads.
        rows: The cells of each row.
        numbers: The columns behind the first one hold numbers, which are right-aligned.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index and numbers else "left")
    for row in rows:
        table.add_row(*row)

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # `main` handles it; rich would end the program with 1

    console = Output()
    if not console.is_terminal:
        console = Output(width=160)
    console.print(table)
