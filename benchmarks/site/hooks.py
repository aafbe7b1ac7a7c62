"""Hooks of mkdocs.yml: pages that are generated, files of the repository's root as pages, links that leave docs/."""

from __future__ import annotations

import posixpath
from typing import Any

from mkdocs.structure.files import File, Files

from benchmarks.site import layout, reference


def on_config(config: Any) -> Any:
    """Put each file of docs/decisions into the nav."""
    config.nav = layout.with_decisions(config.nav)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what is generated; where a committed page is generated too, what the code says now goes before it."""
    pages = reference.pages() | layout.root_pages()
    for name, text in pages.items():
        if (old := files.get_file_from_path(name)) is not None:
            files.remove(old)
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files of the repository outside docs/ lead to their page, or become the name of the file."""
    if page.file.src_uri == "index.md":
        markdown = layout.with_demo(markdown)
    return layout.relinked(markdown, posixpath.dirname(page.file.src_uri))
