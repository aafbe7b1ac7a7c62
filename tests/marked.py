"""Sections of a page that a command writes, between two marks, from figures that it measured."""

from __future__ import annotations

from pathlib import Path

from tests.paths import ROOT

RELIABILITY = ROOT / "docs" / "reliability.md"


def write(page: Path, name: str, text: str) -> None:
    """Put `text`, which ends with a line's end, between `<!-- name -->` and `<!-- /name -->`.

    Where the page has no such marks they come at its end; where there is no page it begins with a title.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    whole = page.read_text(encoding="utf-8") if page.is_file() else "# Reliability\n"
    marked = f"{begin}{text}{end}"
    before, found, rest = whole.partition(begin)
    page.write_text(before + marked + rest.partition(end)[2] if found else f"{whole}\n{marked}", encoding="utf-8")
