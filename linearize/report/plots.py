"""Plots as SVG for the inside of a page: no colours of paper or ink, so that they read on light and on dark; as PNG
for a card.

Series take Okabe and Ito's colours (Color Universal Design, 2008) in a fixed order, from variables that the page sets
for either scheme, and a marker of their own; they are named where they end, not in a legend.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..modeling.errors import EvaluationError

INK = "#010203"
"""Stands for the colour of text, whatever that is."""
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "os^Dvp"
GREY = "#8d939c"
WIDTH = 420
PICTURE_DPI = 144
NARROW = 4
"""Values within this factor of each other are read from zero: a logarithm would make much of little."""
NAME_CHARS = 26
LONG_NAME = 32


@dataclass(frozen=True)
class Line:
    """One series over x, with an interval where there is one; ``series`` picks its colour, None is the ink."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    series: int | None = None
    thin: bool = False
    """Without markers, for many points."""
    shade: float | None = None
    """Where it stands in an order of many, 0 to 1: a shade in the place of a series' colour."""


@dataclass(frozen=True)
class Dot:
    """One row of an interval plot."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    series: int | None = None


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def require() -> None:
    """Raises EvaluationError where matplotlib is not installed."""
    if not available():
        raise EvaluationError(
            "report: its plots need matplotlib, which is not installed; pip install 'linearize[report]'"
        )


def lines(key: str, series: Sequence[Line], *, alt: str, **how: Any) -> str:
    """Lines over x, for the inside of a page; ``how`` is that of :func:`_lines`."""
    with _style():
        return _svg(_lines(series, **how), key, alt)


def picture(series: Sequence[Line], **how: Any) -> bytes:
    """The same as a PNG on white, which shows wherever Markdown does; the same bytes for the same figures."""
    stream = io.BytesIO()
    with _style():
        _lines(series, **how).savefig(
            stream, format="png", dpi=PICTURE_DPI, facecolor="white", metadata={"Software": None}
        )
    return stream.getvalue()


def _lines(
    series: Sequence[Line],
    *,
    x: str,
    y: str,
    lengths: bool = False,
    log: bool = False,
    zero: bool = False,
    band: bool = True,
    marks: Sequence[tuple[float, str]] = (),
    whole: bool = False,
) -> Any:
    """Lines over x. ``lengths``: x is tokens, in doublings; ``log``: y too is logarithmic; ``zero``: y starts at 0;
    ``whole``: x are whole numbers; ``marks`` are upright lines with a word. Intervals are bands, or without ``band``
    bars that stand a little apart."""
    series = [line for line in map(_finite, series) if line.x]
    longest = max((len(short(line.name)) for line in series), default=0)
    figure, axes = _figure(WIDTH, 270, right=18 + 6.3 * longest, top=48 if marks else 34)
    for index, line in enumerate(series):
        apart = 0.0 if band else 0.05 * (index - (len(series) - 1) / 2)
        _draw(axes, line, band, 2**apart)
    if lengths:
        axes.set_xscale("log", base=2)
        found = sorted({value for line in series for value in line.x})
        if (
            len(found) == 1
        ):  # a single length stands in the middle, and those of several models beside each other
            axes.set_xlim(found[0] / 2, found[0] * 2)
        _length_ticks(axes, found)
    values = [value for line in series for value in line.y]
    if log and values and min(values) > 0 and max(values) > NARROW * min(values):
        axes.set_yscale("log")
        _few_log_ticks(axes)
    elif zero or log:
        axes.set_ylim(bottom=0)
    if whole:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _mark(axes, marks)
    axes.set_xlabel(x)
    axes.set_title(y, loc="left", fontsize=11.5, pad=24 if marks else 8)
    _name_ends(figure, axes, series)
    return figure


def dots(key: str, rows: Sequence[Dot], *, x: str, alt: str, line: float | None = None) -> str:
    """One row a value with its interval; ``line`` is an upright line to compare with."""
    longest = max((len(short(row.name, LONG_NAME)) for row in rows), default=0)
    with _style():
        figure, axes = _figure(WIDTH, 62 + 21 * len(rows), left=12 + 6.3 * longest, right=16)
        for index, row in enumerate(rows):
            colour = _colour(row.series)
            low, high = (row.value if end is None else end for end in (row.low, row.high))
            axes.plot([low, high], [index, index], color=colour, linewidth=2, solid_capstyle="round")
            axes.plot([row.value], [index], _marker(row.series), color=colour, markersize=6)
        if line is not None:
            axes.axvline(line, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        axes.set_yticks(range(len(rows)), [short(row.name, LONG_NAME) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.set_xlabel(x)
        return _svg(figure, key, alt)


def heat(
    key: str,
    cells: Sequence[Sequence[float | None]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    x: str,
    y: str,
    alt: str,
    grey: Sequence[Sequence[bool]] | None = None,
    signed: bool = False,
) -> str:
    """Percent by row and column, the number in every cell; ``grey`` cells say nothing; ``signed`` is a difference."""
    import matplotlib

    colours = matplotlib.colormaps["PuOr" if signed else "viridis"]
    width = 300
    longest = max(map(len, rows), default=0)
    with _style():
        left, right = 26 + 6.5 * longest, 10
        figure, axes = _figure(width, 84 + 23 * len(rows), left=left, right=right, top=26)
        for i, row in enumerate(cells):
            for j, value in enumerate(row):
                gated = bool(grey and grey[i][j])
                share = 0.5 + (value or 0) / 200 if signed else (value or 0) / 100
                rgba = (0, 0, 0, 0) if value is None else colours(min(max(share, 0.0), 1.0))
                face: Any = GREY if gated else rgba
                axes.add_patch(_box(j, i, face))
                # Relative luminance decides which ink is readable on a cell.
                light = 0.2126 * rgba[0] + 0.7152 * rgba[1] + 0.0722 * rgba[2] > 0.45
                ink = INK if value is None else "#000000" if gated or light else "#ffffff"
                text = "·" if value is None else _signed(value) if signed else f"{value:.0f}"
                axes.text(j, i, text, ha="center", va="center", color=ink, fontsize=10.5)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_xlabel(x)
        if y:
            axes.set_ylabel(y)
        # A title that is wider than the cells begins further left, over the names of the rows.
        title, room = short(title, 40), width - left - right
        start = max(-left, min(0.0, room - 7 * len(title))) / room
        axes.set_title(title, loc="left", fontsize=11.5, pad=8, x=start)
        return _svg(figure, key, alt)


def tokens(length: float) -> str:
    """2048 -> "2K"."""
    length = int(length)
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else f"{length:,}"


def short(name: str, chars: int = NAME_CHARS) -> str:
    """A name for a plot; tables have the whole of it."""
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return name if len(name) <= chars else name[: chars - 1] + "…"


def thinned(x: Sequence[float], y: Sequence[float], most: int = 120) -> tuple[list[float], list[float]]:
    """At most so many points of a long curve: means over equal runs of steps."""
    step = max(1, math.ceil(len(x) / most))
    starts = range(0, len(x), step)
    return [x[min(i + step, len(x)) - 1] for i in starts], [_mean(y[i : i + step]) for i in starts]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "linearize",  # the same file for the same figures
            "text.parse_math": False,  # names are names, whatever dollars they hold
            "font.family": "sans-serif",
            "font.size": 11,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.unicode_minus": False,
            "grid.color": INK,
            "grid.alpha": 0.13,
            "grid.linewidth": 0.8,
            "xtick.color": INK,
            "ytick.color": INK,
            "lines.linewidth": 1.8,
        }
    )


def _figure(
    width: float, height: float, *, left: float = 50, right: float = 16, top: float = 34
) -> tuple[Any, Any]:
    """A figure of so many points with one plot, its margins in points; a name never takes half of it."""
    from matplotlib.figure import Figure

    left, right = min(left, width * 0.5), min(right, width * 0.42)
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    bottom = 44.0
    spot = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    if height - bottom - top < 20:
        spot = (spot[0], bottom / height, spot[2], 1 - (bottom + 8) / height)
    return figure, figure.add_axes(spot)


def _signed(value: float) -> str:
    return f"{value:+.0f}" if round(value) else "0"


def _box(column: int, row: int, face: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, facecolor=face, edgecolor="none")


def _colour(series: int | None) -> str:
    return INK if series is None else SERIES[series % len(SERIES)]


def _finite(line: Line) -> Line:
    """Without the points that have no value."""
    kept = [i for i, value in enumerate(line.y) if math.isfinite(value)]
    ends = {
        name: [side[i] for i in kept] for name in ("low", "high") if (side := getattr(line, name)) is not None
    }
    return replace(line, x=[line.x[i] for i in kept], y=[line.y[i] for i in kept], **ends)


def _line_colour(line: Line) -> Any:
    if line.shade is None:
        return _colour(line.series)
    import matplotlib

    return matplotlib.colormaps["viridis"](0.2 + 0.6 * line.shade)  # its ends fade into paper or night


def _marker(series: int | None) -> str:
    return "d" if series is None else MARKERS[series % len(MARKERS)]


def _draw(axes: Any, line: Line, band: bool, moved: float) -> None:
    colour, x = _line_colour(line), [value * moved for value in line.x]
    style = (0, (5, 2)) if line.series is None and line.shade is None else "-"
    marker = {} if line.thin else {"marker": _marker(line.series), "markersize": 4.5}
    axes.plot(x, line.y, color=colour, linestyle=style, **marker)
    if line.low is not None and line.high is not None:
        low, high = (
            [math.nan if value is None else value for value in edge] for edge in (line.low, line.high)
        )
        if band:
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.vlines(x, low, high, color=colour, linewidth=1.2)


def _mark(axes: Any, marks: Sequence[tuple[float, str]]) -> None:
    """Upright lines, each with its word above the plot, inside its width."""
    for at, word in marks:
        axes.axvline(at, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        place = axes.transAxes.inverted().transform(axes.transData.transform((at, axes.get_ylim()[0])))[0]
        side = "left" if place < 0.2 else "right" if place > 0.8 else "center"
        axes.annotate(
            word, (at, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points",
            ha=side, va="bottom", color=INK, fontsize=10.5,
        )  # fmt: skip


def _length_ticks(axes: Any, found: Sequence[float]) -> None:
    step = max(1, math.ceil(len(found) / 6))
    kept = list(found)[::-1][::step][::-1]
    axes.set_xticks(kept, [tokens(value) for value in kept])
    axes.minorticks_off()


def _few_log_ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    decades = math.log10(high / low) if low > 0 else 1
    steps = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _name_ends(figure: Any, axes: Any, series: Sequence[Line]) -> None:
    """Every line's name at its right end, moved apart where they would touch."""
    named = [line for line in series if line.name and len(line.x)]
    places = sorted(
        (axes.transData.transform((line.x[-1], line.y[-1]))[1], index) for index, line in enumerate(named)
    )
    box, gap, heights = axes.get_window_extent(), 13.0, {}
    floor = box.y0 - gap
    for at, index in places:
        floor = heights[index] = max(at, floor + gap)
    over = max(0.0, floor - box.y1)
    ceiling = math.inf
    for _, index in reversed(places):  # and down again, where the topmost was pushed out
        ceiling = heights[index] = min(heights[index], ceiling - gap, box.y1 if over else math.inf)
    for index, line in enumerate(named):
        x = figure.transFigure.inverted().transform((box.x1 + 7, heights[index]))
        figure.text(
            x[0], x[1], short(line.name), color=_line_colour(line), va="center", ha="left", fontsize=11
        )


def _svg(figure: Any, key: str, alt: str) -> str:
    """The figure to stand inside a page: its ids are its own, and its colours are the page's."""
    import html

    stream = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(stream, format="svg", metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    opening, _, rest = text.partition(">")
    box = re.search(r'viewBox="([^"]+)"', opening)
    assert box is not None
    rest = re.sub(r"<style[^>]*>.*?</style>", "", rest, flags=re.DOTALL)
    rest = re.sub(r"<[^>]+>", lambda tag: _inside(tag.group(), key), rest)
    width = float(box.group(1).split()[2])
    return (
        f'<svg role="img" aria-label="{html.escape(alt, quote=True)}" viewBox="{box.group(1)}" '
        f'style="max-width:{width * 1.5:.0f}px">{rest}'
    )


def _inside(tag: str, key: str) -> str:
    """One tag with the page's colours and type, and with ids that no other figure has; names between tags stay."""
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag.replace("xlink:href", "href"))
    tag = re.sub(r'\bid="', f'id="{key}-', tag)
    tag = re.sub(r'(url\(|href=")#', rf"\g<1>#{key}-", tag)
    tag = tag.replace(INK, "currentColor")
    for index, colour in enumerate(SERIES):
        tag = tag.replace(colour, f"var(--s{index})")
    return tag
