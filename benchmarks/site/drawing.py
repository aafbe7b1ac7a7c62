"""A few SVG elements as text, with coordinates to a tenth of a pixel so that a picture is the same bytes everywhere."""

from __future__ import annotations

from xml.sax.saxutils import escape

INK, GREY, PALE = "#1f2933", "#7b8794", "#cbd2d9"
LAST, FIRST, NESTED, REWARD = "#3f51b5", "#00897b", "#d9730d", "#b3261e"
FONT = "font-family='system-ui, Helvetica, Arial, sans-serif'"


def number(value: float) -> str:
    """To a tenth, without a trailing .0 and without a negative zero."""
    return f"{round(value, 1) + 0.0:g}"


def circle(x: float, y: float, r: float, fill: str, stroke: str, width: float = 1.5, more: str = "") -> str:
    """A node."""
    at = f"cx='{number(x)}' cy='{number(y)}' r='{number(r)}'"
    return f"<circle {at} fill='{fill}' stroke='{stroke}' stroke-width='{number(width)}'{more}/>"


def line(x: float, y: float, to_x: float, to_y: float, stroke: str, width: float = 1.5, more: str = "") -> str:
    """A straight line."""
    ends = f"x1='{number(x)}' y1='{number(y)}' x2='{number(to_x)}' y2='{number(to_y)}'"
    return f"<line {ends} stroke='{stroke}' stroke-width='{number(width)}'{more}/>"


def arc(start: tuple[float, float], end: tuple[float, float], height: float, stroke: str, width: float = 1.5,
        more: str = "") -> str:  # fmt: skip
    """A quadratic Bézier curve whose middle is `height` above (below if negative) the middle of its ends."""
    (x, y), (to_x, to_y) = start, end
    control = f"{number((x + to_x) / 2)} {number((y + to_y) / 2 - 2 * height)}"
    path = f"M{number(x)} {number(y)} Q{control} {number(to_x)} {number(to_y)}"
    return f"<path d='{path}' fill='none' stroke='{stroke}' stroke-width='{number(width)}'{more}/>"


def text(x: float, y: float, words: str, fill: str = INK, size: int = 13, anchor: str = "start", more: str = "") -> str:
    """One line of text."""
    at = f"x='{number(x)}' y='{number(y)}' text-anchor='{anchor}' font-size='{size}' fill='{fill}'{more}"
    return f"<text {at}>{escape(words)}</text>"


def arrow_ends() -> str:
    """One arrow head for each colour, to be named by `arrow`."""
    heads = []
    for colour in (LAST, FIRST, NESTED, REWARD, GREY):
        shape = "viewBox='0 0 8 8' refX='6' refY='4' markerWidth='11' markerHeight='11' markerUnits='userSpaceOnUse'"
        heads.append(
            f"<marker id='a{colour[1:]}' {shape} orient='auto'><path d='M0 0 L8 4 L0 8 z' fill='{colour}'/></marker>"
        )
    return f"<defs>{''.join(heads)}</defs>"


def arrow(colour: str) -> str:
    """The attribute that ends a path in an arrow of its colour."""
    return f" marker-end='url(#a{colour[1:]})'"


def document(width: int, height: int, title: str, description: str, elements: list[str]) -> str:
    """The whole file, on white, so that it can be read on dark pages too."""
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img' {FONT}>"
    named = f"<title>{escape(title)}</title>\n<desc>{escape(description)}</desc>"
    ground = f"<rect width='{width}' height='{height}' rx='8' fill='#ffffff'/>"
    return "\n".join([head, named, arrow_ends(), ground, *elements, "</svg>", ""])
