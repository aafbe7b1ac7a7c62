"""docs/reliability.md: each campaign writes a section of it, and its figures as JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.paths import ROOT

PAGE = ROOT / "docs" / "reliability.md"
FIGURES = ROOT / "docs" / "data"


def publish(name: str, figures: Mapping[str, Any], text: str) -> None:
    """Write the figures of a campaign to docs/data/<name>.json, and its section of the page."""
    file = FIGURES / f"{name.replace(' ', '_')}.json"
    file.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_section(PAGE, name, text)


def write_section(page: Path, name: str, text: str) -> None:
    """Put a section between its marks, <!-- name --> and <!-- /name -->; where there are none, at the page's end.

    text: Markdown that ends with a line break.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    whole = page.read_text(encoding="utf-8") if page.is_file() else "# Reliability\n"
    before, found, rest = whole.partition(begin)
    marked = begin + text + end
    page.write_text(before + marked + rest.partition(end)[2] if found else f"{whole}\n{marked}", encoding="utf-8")
