"""One page for a run or several: an HTML file that needs nothing else, and the same in Markdown.

The HTML loads nothing and runs nothing; whatever comes from a run is escaped. Markdown has the figures' numbers in
their place.
"""

import html
import re
from collections.abc import Sequence
from pathlib import Path

from ..files import write_text
from ..modeling.errors import EvaluationError
from . import plots, words
from .blocks import Code, Figures, Points, Section, Words
from .record import Run, open_runs
from .sections import sections
from .tables import Table


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> tuple[Path, Path]:
    """Write ``output`` (HTML; `report.html` in the one run's folder, or here) and its Markdown twin; returns both.

    Raises EvaluationError for a folder without results, or where matplotlib is missing.
    """
    plots.require()
    runs = open_runs(folders)
    file = Path(output) if output else (Path(folders[0]) if len(runs) == 1 else Path()) / "report.html"
    if file.suffix not in (".html", ".htm"):
        raise EvaluationError(
            f"output: {file} is not the name of a page; end it with .html (its twin will have .md)"
        )
    if file.is_dir():
        raise EvaluationError(f"output: {file} is a folder; name a file in it")
    made, twin = sections(runs), file.with_suffix(".md")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(twin, as_markdown_page(title(runs), made))
    write_text(file, as_html(title(runs), made))
    return file, twin


def title(runs: Sequence[Run]) -> str:
    """What is compared, in a line."""
    if len(runs) > 1:
        return f"{', '.join(run.name for run in runs)}: a comparison"
    teacher = Path(str((runs[0].recipe.get("teacher") or {}).get("name", "a teacher"))).name
    return f"{teacher} converted with {words.methods(runs[0])}"


def as_html(heading: str, made: Sequence[Section]) -> str:
    """The page; every word of it is escaped but the SVGs, which escape their own."""
    import jinja2

    source = Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.tests |= {"block": lambda block, name: type(block).__name__ == name}
    return environment.from_string(source).render(title=heading, sections=made, colours=plots.SERIES)


def as_markdown_page(heading: str, made: Sequence[Section]) -> str:
    """The page's twin."""
    parts = [f"# {_plain(heading)}"]
    for section in made:
        parts.append(f"## {_plain(section.title)}")
        for block in section.blocks:
            parts += _markdown(block)
    return "\n\n".join(parts) + "\n"


def _markdown(block: object) -> list[str]:
    match block:
        case Words(text, "heading"):
            return [f"### {_plain(text)}"]
        case Words(text):
            return [_plain(text)]
        case Points(lines):
            return ["\n".join(f"- {_plain(line)}" for line in lines)]
        case Table():
            return [f"### {_plain(block.title)}", *([_plain(block.note)] if block.note else []), _rows(block)]
        case Figures():
            tables = [(f.caption, f.table) for f in block.figures] + [("", block.table)]
            return [
                part for caption, table in tables if table for part in (_plain(caption), _rows(table)) if part
            ]
        case Code(name, text):
            ticks = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 3)
            return [f"### {_plain(name)}", f"{ticks}text\n{text.rstrip()}\n{ticks}"]
    raise AssertionError(block)


def _rows(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in cells) + " |" for cells in lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no tags, no links, no images, no cells of its own, on one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    text = text.replace("](", "]\\(").replace("|", "\\|").replace("`", "\\`")
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
