"""Where the site's pages come from: docs/, the repository's root, and the code."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
DECISIONS = "Decisions"
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s:]+)\)")


def with_decisions(nav: list[Any]) -> list[Any]:
    """The nav of mkdocs.yml, whose section `Decisions` lists the files of docs/decisions in order."""
    found = [f"decisions/{path.name}" for path in sorted((DOCS / "decisions").glob("*.md"))]
    return [{DECISIONS: found} if isinstance(entry, dict) and DECISIONS in entry else entry for entry in nav]


def nav_pages(nav: Any) -> list[str]:
    """The files that a nav names, in order."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in nav_pages(entry)]


def root_pages() -> dict[str, str]:
    """The pages that lie in the repository's root, by their names on the site, with their links seen from docs/."""
    return {name: _from_root((ROOT / source).read_text()) for source, name in ROOT_PAGES.items()}


def with_demo(markdown: str) -> str:
    """The table of README.md in the place of its mark; `python -m benchmarks.demo --readme` writes it there."""
    table = (ROOT / "README.md").read_text().split("<!-- demo -->\n")[1].split("<!-- /demo -->")[0]
    return markdown.replace("<!-- demo -->", table)


def relinked(markdown: str, folder: str) -> str:
    """Markdown of a page in `folder` of docs/, in which a link out of docs/ leads to a page, or is a file's name."""

    def instead(match: re.Match[str]) -> str:
        label, target = match.groups()
        path, sign, anchor = target.partition("#")
        where = posixpath.normpath(posixpath.join("docs", folder, path))
        if not path or where.startswith("docs/"):
            return match.group(0)
        if where in ROOT_PAGES:
            return f"[{label}]({posixpath.relpath(ROOT_PAGES[where], folder or '.')}{sign}{anchor})"
        if where == "README.md":
            return f"[{label}]({posixpath.relpath('index.md', folder or '.')})"
        return f"`{where}`" if label.strip("`") in where else f"{label} (`{where}`)"

    return LINK.sub(instead, markdown)


def _from_root(markdown: str) -> str:
    """Links of a file in the root, as they are from docs/."""
    return LINK.sub(
        lambda m: f"[{m[1]}]({posixpath.relpath(m[2], 'docs')})" if not m[2].startswith("#") else m[0], markdown
    )
