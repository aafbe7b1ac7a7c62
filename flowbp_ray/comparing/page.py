"""A suite as one HTML page that needs no network: the table, curves, and pictures of the same prompts by every row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from flowbp_ray.artifacts import charts
from flowbp_ray.artifacts.markup import code, data_url, details, note, section, table, text
from flowbp_ray.comparing.figure import draw, pixels
from flowbp_ray.comparing.results import Comparison, Value, percent
from flowbp_ray.comparing.suite import BASE, Cell
from flowbp_ray.config import yaml_text
from flowbp_ray.run.folder import Run
from flowbp_ray.run.pictures import read_grid
from flowbp_ray.utils.addresses import expand
from flowbp_ray.utils.files import write_atomically

PICTURES = 9  # prompts whose pictures are shown
AGAINST = {"optimizer step": "steps", "images generated": "images", "hours in steps": "hours"}


def write_page(found: Comparison, cells: Sequence[Cell], path: Path) -> Path:
    """Write the page of a suite."""
    style = (files("flowbp_ray.artifacts") / "report.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    body = "".join([_table(found), _curves(found), _pictures(found, cells), _figures(found), _about(found)])
    content = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{text(policy)}">'
        f"<title>{text(found.suite.name)} – flowbp_ray</title><style>{style}</style></head>"
        f"<body><header><h1>{text(found.suite.name)}</h1>"
        f'<p class="what">{len(found.suite.rows)} rows, {len(found.suite.seeds)} seeds</p></header>'
        f"<main>{body}</main></body></html>\n"
    )
    write_atomically(path, lambda partial: partial.write_bytes(content.encode("utf-8", "backslashreplace")))
    return path


def _table(found: Comparison) -> str:
    about = (
        f"Held-out prompts after training, at guidance {found.guidance}: mean over seeds ± its 95 % interval. "
        "Bold: the best of its column. ≈: its difference from the best, seed by seed, may be zero by its interval."
    )
    minus = f"Minus {found.suite.reference}, seed by seed. Bold: the interval is without zero."
    parts = [note(about), _rows(found, found.table, "")]
    parts += [note(minus), _rows(found, found.differences, "+")] if found.differences else []
    image = data_url(pixels(draw(found)), 2000)
    alt = "Each row: seeds, mean and interval of every column"
    parts.append(f'<div class="scroll"><img class="figure" alt="{alt}" src="{image}"></div>')
    parts += [note(f"Without a result yet: {'; '.join(found.missing)}.")] if found.missing else []
    return section("table", "Table", *parts)


def _rows(found: Comparison, values: Mapping[str, Mapping[str, Value]], sign: str) -> str:
    rows = []
    for row, each in values.items():
        cells = [text(row)]
        for column in found.columns:
            value = each[column]
            shown = text(value.shown(percent(column), sign))
            cells.append(
                f"<b>{shown}</b>" if value.mark in ("best", "clear") else shown + " ≈" * (value.mark == "close")
            )
        rows.append([*cells, str(max(v.seeds for v in each.values()))])
    return table(["", *(text(column) for column in found.columns), "seeds"], rows, "suite")


def _curves(found: Comparison) -> str:
    groups: list[str] = []
    for label, attribute in AGAINST.items():
        drawn = []
        for column in found.columns:
            series = [
                charts.Series(row, getattr(curve, attribute), curve.values[column])
                for row, curve in found.curves.items()
                if column in curve.values and len(curve.steps) > 1
            ]
            drawn.append(charts.line_chart(column, series, label, percent(column), smooth=False))
        if any(drawn):
            groups.append(details(f"against {label}", f'<div class="charts">{"".join(drawn)}</div>', not groups))
    return section("curves", "Curves", *groups)


def _pictures(found: Comparison, cells: Sequence[Cell]) -> str:
    """The first seed's pictures of the same prompts from the same noise, a row of the table each."""
    rows = list(_sheets(found, cells))
    if not rows:
        return ""
    parts = []
    for row, images in rows:
        shown = "".join(f'<img class="small" alt="{text(row)}" src="{data_url(image)}">' for image in images)
        parts.append([text(row), shown])
    about = "The same held-out prompts from the same noise, of the first seed; not chosen by hand."
    return section("pictures", "Pictures", note(about), table([], parts, "facts"))


def _sheets(found: Comparison, cells: Sequence[Cell]) -> Iterator[tuple[str, list[np.ndarray]]]:
    first = {cell.row: cell for cell in reversed(cells)}
    base = False
    for row in found.suite.rows:
        with contextlib.suppress(OSError, ValueError, KeyError):
            run = Run.open(first[row].folder)
            model, count = run.config.backbone, run.config.evaluation.pictures
            for name, step in ((BASE, 0), (row, max(run.checkpoints.steps()))):
                if name == BASE and base:
                    continue
                file = run.images / f"step_{step:06d}_guidance_{found.guidance}.png"
                images = read_grid(file, model.height, model.width)[:count]
                chosen = [images[i * len(images) // PICTURES] for i in range(min(PICTURES, len(images)))]
                base |= name == BASE
                yield name, chosen


def _figures(found: Comparison) -> str:
    """The pictures that the suite names, under their captions."""
    parts = []
    for caption, file in found.suite.figures.items():
        with Image.open(expand(file)) as image:
            url = data_url(np.asarray(image.convert("RGB")), 2000)
        parts += [
            note(caption),
            f'<div class="scroll"><img class="figure" alt="{text(caption)}" src="{url}"></div>',
        ]
    return section("figures", "Figures", *parts) if parts else ""


def _about(found: Comparison) -> str:
    plain = found.suite.model_dump(mode="json", exclude_defaults=True, exclude={"figures"})
    return section("suite", "The suite", code(yaml_text.dump(plain)))
