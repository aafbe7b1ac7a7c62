"""Small pieces of HTML. What comes from a run (prompts, names, configuration) passes `text` or `code`, which escape."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

SMALL = 128  # pixels; pictures up to this width are kept bit for bit
LARGEST = 384  # pixels to which wider ones are reduced
QUALITY = 82  # of WebP


def text(value: object) -> str:
    """Escaped, within attributes too."""
    return escape(str(value), quote=True)


def marked(value: str) -> str:
    """Escaped, with `code` of Markdown as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", text(value))


def code(value: str) -> str:
    """A block of code."""
    return f"<pre><code>{text(value)}</code></pre>"


def note(value: str) -> str:
    """A paragraph that says how something was measured, or what is missing."""
    return f'<p class="note">{marked(value)}</p>'


def listing(entries: Mapping[str, str]) -> str:
    """A table of names and values, which may hold `code`."""
    rows = [[text(name), marked(value)] for name, value in entries.items() if value]
    return table([], rows, "facts") if rows else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML; the first of a row is its header. It scrolls within itself where it is wide."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    above = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="scroll"><table class="{kind}">{above}<tbody>{body}</tbody></table></div>'


def details(title: str, inner: str, opened: bool = False) -> str:
    """A part that can be folded."""
    return f"<details{' open' if opened else ''}><summary>{text(title)}</summary>{inner}</details>"


def section(name: str, title: str, *parts: str) -> str:
    """A section with an anchor; nothing where it has no parts."""
    inner = "".join(parts)
    return f'<section id="{name}"><h2>{text(title)}</h2>{inner}</section>' if inner else ""


def data_url(picture: np.ndarray, largest: int = LARGEST) -> str:
    """A picture [H, W, 3] uint8 as a data URL of WebP: bit for bit where it is small, else at most `largest` wide."""
    image, file = Image.fromarray(picture), io.BytesIO()
    if image.width <= SMALL:
        image.save(file, "WEBP", lossless=True, method=6)
    else:
        image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
        image.save(file, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
