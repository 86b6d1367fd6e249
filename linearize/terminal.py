"""What a terminal shows: tables and rows on stdout, bars on stderr; rich is imported where it is needed."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer


def stdout() -> Any:
    """The console of results."""
    from rich.console import Console

    # A pipe or a file has no width of its own; tables are easier to read unbroken.
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 150)


_console: Any = None


def stderr() -> Any:
    """One console for logs and bars, so that a line of the log does not tear a bar."""
    from rich.console import Console

    global _console
    if _console is None or _console.file is not sys.stderr:
        _console = Console(file=sys.stderr)
    return _console


@contextmanager
def watching() -> Iterator[Any]:
    """A callback that draws one bar per phase: done, tokens a second, the loss, the time left.

    Where stderr is not a terminal, each phase is one line when it ends.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = stderr()
    bars: dict[str, Any] = {}
    display = Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[pace]:>16}"),
        TextColumn("{task.fields[loss]:>12}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )

    def watch(at: Any) -> None:
        if at.phase not in bars:
            if console.is_terminal:
                display.start()
            bars[at.phase] = display.add_task(at.phase, total=at.total, completed=at.done, pace="", loss="")
        bar = bars[at.phase]
        task = display.tasks[bar]
        speed = task.finished_speed or task.speed
        pace = f"{speed:,.0f} {at.unit}/s" if speed else ""
        loss = f"loss {at.metrics['loss']:.4f}" if "loss" in at.metrics else ""
        ended = not task.finished and at.done >= at.total
        display.update(bar, total=at.total, completed=at.done, pace=pace, loss=loss)
        if ended and not console.is_terminal:
            spent = f"{task.elapsed or 0:.0f} s"
            typer.echo(
                " ".join(filter(None, [f"{at.phase}:", f"{at.total:,} {at.unit}", spent, loss])), err=True
            )

    try:
        yield watch
    finally:
        if display.live.is_started:
            display.stop()


def print_results(results: Any) -> None:
    """The tables of a run."""
    from .report import tables

    print_tables(tables(results))


def print_tables(tables: Any) -> None:
    """Tables as `report` makes them."""
    from rich.table import Table
    from rich.text import Text

    console = stdout()
    for made in tables:
        title, note = Text(made.title), Text(made.note)  # as they are: [words] are no markup here
        table = Table(title=title, caption=note, title_justify="left", caption_justify="left")
        for name in made.header:
            table.add_column(Text(name))
        for row in made.rows:
            table.add_row(*map(Text, row))
        console.print(table)


def print_json(text: str) -> None:
    """A JSON object on one line."""
    typer.echo(json.dumps(json.loads(text)))


def print_rows(rows: Any) -> None:
    """Plain columns, as wide as they need to be."""
    rows = [tuple(str(cell) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1024
    return f"{count:,.1f} GiB"


def duration(seconds: float | None) -> str:
    """Seconds as a person reads them; nothing known is a dash."""
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
