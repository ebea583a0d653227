"""The tables of a page as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from common.results import markdown_table
from hvdlm.report.page import Section


def markdown(title: str, lead: str, sections: Sequence[Section]) -> str:
    parts = [f"# {title}\n\n{lead}\n"]
    for each in sections:
        if each.table:
            parts.append(f"## {each.title}\n\n{each.text}\n\n{markdown_table(each.table.columns, each.table.rows)}")
    return "\n".join(parts)
