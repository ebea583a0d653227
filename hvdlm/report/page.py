"""The page of a report: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
body { font: 15px/1.5 Georgia, serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #111; }
h1, h2 { font-weight: normal; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
th, td { padding: 2px 9px; text-align: right; border-bottom: 1px solid #ccc; } th { border-bottom-color: #111; }
td:first-child, th:first-child { text-align: left; }
@media print { h2 { break-after: avoid; } svg, table { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Table:
    """Columns by name, and rows of cells."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        return f"<table><tr>{head}</tr>{body}</table>"


@dataclass(frozen=True)
class Section:
    """A heading, a sentence that explains it, then a figure (SVG) or a table, or both."""

    title: str
    text: str
    figure: str = ""
    table: Table | None = None


def html(title: str, lead: str, sections: Sequence[Section]) -> str:
    parts = [f"<h1>{escape(title)}</h1><p>{escape(lead)}</p>"]
    for section in sections:
        table = section.table.html() if section.table else ""
        parts.append(f"<h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>{section.figure}{table}")
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )
