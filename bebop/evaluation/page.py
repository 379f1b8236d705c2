"""Tables and figures as one HTML page that needs nothing else, and as text on a terminal."""

import base64
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import rich.markup
import rich.table
from matplotlib.figure import Figure
from rich.console import Console

from bebop.writing import complete

_PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font: 16px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #111; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
p { max-width: 48rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0 1.4rem; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ccc; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #111; }
figure { margin: 1rem 0 1.6rem; } img { max-width: 100%; } figcaption { font-size: .9rem; color: #444; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
<section>
<h2>{{ section.heading }}</h2>
{% for paragraph in section.text if paragraph %}<p>{{ paragraph }}</p>
{% endfor %}
{% for table in section.tables %}
<div class="scroll"><table>
<caption>{{ table.title }}</caption>
<thead><tr>{% for name in table.columns %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% endfor %}
{% for caption, source in section.images %}
<figure><img src="data:image/png;base64,{{ source }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</section>
{% endfor %}
</body>
</html>
""",
    autoescape=True,
    trim_blocks=True,
)


@dataclass
class Table:
    """Cells are text; the first column names the rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def for_terminal(self) -> rich.table.Table:
        table = rich.table.Table(title=rich.markup.escape(self.title), title_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(rich.markup.escape(column), justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*(rich.markup.escape(cell) for cell in row))
        return table


@dataclass
class Section:
    """A part of a page. `figures` are (file name, caption, figure)."""

    heading: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[tuple[str, str, Figure]] = field(default=())


def write_page(directory: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write report.html, and every figure beside it as a PNG file of its own; each appears complete."""
    parts = []
    for section in sections:
        images = []
        for name, caption, figure in section.figures:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=130)
            write_whole(directory / f"{name}.png", buffer.getvalue())
            images.append((caption, base64.b64encode(buffer.getvalue()).decode()))
        parts.append({"heading": section.heading, "text": section.text, "tables": section.tables, "images": images})
    write_whole(page := directory / "report.html", _PAGE.render(title=title, sections=parts).encode())
    return page


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears under its name once it is complete."""
    with complete(path) as partial:
        partial.write_bytes(content)


def terminal() -> Console:
    """Where tables are printed; wide enough for them where there is no terminal, as in a log."""
    return Console() if sys.stdout.isatty() else Console(width=140)
