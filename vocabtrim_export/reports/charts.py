"""Charts as geometry, which `chart.svg.jinja` draws. All lengths are in the units of the drawing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 420, 308
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 24, 46
LEGEND, LETTERS = 18, 56  # the height of a legend's line, and the letters that fit into it
STYLES = 6  # styles of lines in the page's style sheet, by colour, dashes and marks


@dataclass(frozen=True, slots=True)
class Series:
    """A line of a chart.

    Attributes:
        name: Its name in the legend.
        points: (x, y) of each point, x ascending.
        band: (x, low, high) of an interval around the line.
        is_line: Whether the points are joined.
        has_marks: Whether the points are marked.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float, float], ...] = ()
    is_line: bool = True
    has_marks: bool = True


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart.

    Attributes:
        title: Its title.
        summary: Its content in a sentence, for people who cannot see it.
        x_label: The name of the x axis.
        y_label: The name of the y axis.
        series: Its lines.
        x_ticks: (x, text) of each tick.
        is_log: Whether the x axis is logarithmic.
        is_share: Whether y is a share, shown in percent.
        floor: The least y that the axis shows.
        mark: (x, text) of a vertical line; None for none.
    """

    title: str
    summary: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_ticks: tuple[tuple[float, str], ...]
    is_log: bool = False
    is_share: bool = False
    floor: float = 0.0
    mark: tuple[float, str] | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of a drawn line.

    Attributes:
        x: Its place.
        y: Its place.
        text: The text that appears when it is pointed at.
    """

    x: float
    y: float
    text: str


@dataclass(frozen=True, slots=True)
class DrawnLine:
    """A line in the units of the drawing.

    Attributes:
        name: Its name in the legend.
        style: Its number among the `STYLES`.
        path: The points, "x,y x,y …".
        band: The outline of the interval around it, "x,y x,y …".
        marks: Its marked points.
        legend_y: The place of its name in the legend.
    """

    name: str
    style: int
    path: str
    band: str
    marks: tuple[Mark, ...]
    legend_y: float


@dataclass(frozen=True, slots=True)
class Tick:
    """A tick of an axis."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Drawing:
    """A chart in the units of the drawing."""

    chart: Chart
    height: int
    lines: tuple[DrawnLine, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    mark: Tick | None
    left: int = field(default=LEFT, init=False)
    right: int = field(default=WIDTH - RIGHT, init=False)
    top: int = field(default=TOP, init=False)
    bottom: int = field(default=HEIGHT - BOTTOM, init=False)
    width: int = field(default=WIDTH, init=False)


def draw(chart: Chart) -> Drawing:
    """Place a chart's points, ticks and legend."""
    x_values = [x for x, _ in chart.x_ticks] + [x for line in chart.series for x, _ in line.points]
    x_axis = _Axis(min(x_values), max(x_values), LEFT + 8, WIDTH - RIGHT - 8, chart.is_log)
    tops = [y for line in chart.series for y in [*(y for _, y in line.points), *(high for _, _, high in line.band)]]
    ticks = nice_ticks(chart.floor, 1.0 if chart.is_share else max(tops, default=1.0))
    y_axis = _Axis(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP, False)
    lines = tuple(_line(chart, line, index, x_axis, y_axis) for index, line in enumerate(chart.series))
    return Drawing(
        chart,
        HEIGHT + LEGEND * len(lines),
        lines,
        tuple(Tick(x_axis(x), text) for x, text in chart.x_ticks),
        tuple(Tick(y_axis(y), _number(y, chart.is_share)) for y in ticks),
        Tick(x_axis(chart.mark[0]), chart.mark[1]) if chart.mark else None,
    )


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Returns round numbers at equal distances, from at most `low` to at least `high`."""
    span = max(high - low, 1e-9)
    power = 10 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if span / (power * factor) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True, slots=True)
class _Axis:
    """Maps numbers from `low` to `high` to places from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(each) if self.is_log else each for each in (self.low, self.high, value))
        share = (at - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def _line(chart: Chart, line: Series, index: int, x_axis: _Axis, y_axis: _Axis) -> DrawnLine:
    places = [(x_axis(x), y_axis(max(y, chart.floor))) for x, y in line.points]
    marks = tuple(
        Mark(*place, f"{line.name}, {chart.x_label} {x:,.0f}: {_number(y, chart.is_share)}")
        for place, (x, y) in zip(places, line.points, strict=True)
        if line.has_marks
    )
    above = [(x_axis(x), y_axis(max(high, chart.floor))) for x, _, high in line.band]
    below = [(x_axis(x), y_axis(max(low, chart.floor))) for x, low, _ in reversed(line.band)]
    path = _points(places) if line.is_line and len(places) > 1 else ""
    legend_y = HEIGHT + LEGEND * (index + 0.5)
    name = line.name if len(line.name) <= LETTERS else f"{line.name[: LETTERS - 1]}…"
    return DrawnLine(name, index % STYLES, path, _points([*above, *below]), marks, legend_y)


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in places)


def _number(value: float, is_share: bool) -> str:
    return f"{value:.4g}" if not is_share else f"{100 * value:.4g}%"
