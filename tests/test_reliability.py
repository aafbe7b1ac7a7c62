"""The page of figures: a section replaces its own text and nothing else."""

from __future__ import annotations

from pathlib import Path

from tests.reliability import write_section


def test_a_section_is_added_once_and_replaced_in_its_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_section(page, "one", "## One\nold\n")
    write_section(page, "two", "## Two\n")
    write_section(page, "one", "## One\nnew\n")
    assert page.read_text() == (
        "# Reliability\n\n<!-- one -->\n## One\nnew\n<!-- /one -->\n\n<!-- two -->\n## Two\n<!-- /two -->\n"
    )
