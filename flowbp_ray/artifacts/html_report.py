"""report.html: one page of a run that needs no network, from the run's folder alone, whether it has ended or goes on.

A browser is told to fetch nothing and to run no script but the page's own, whose hash the page states.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path

from flowbp_ray import __version__
from flowbp_ray.artifacts import findings
from flowbp_ray.artifacts import report_measured as measured
from flowbp_ray.artifacts import report_run as about
from flowbp_ray.artifacts.card_phrases import ways_of_learning
from flowbp_ray.artifacts.findings import Findings, remarks
from flowbp_ray.artifacts.markup import note, text
from flowbp_ray.observability.reader import format_duration
from flowbp_ray.utils.files import write_atomically

NAME = "report.html"


@dataclass(frozen=True)
class Written:
    """Where the page is, and its bytes."""

    path: Path
    bytes: int


def write_report(folder: str | Path, out: Path | None = None) -> Written:
    """Write the page of the run in `folder` to `out` (default: report.html in the folder), in place of an older one.

    Raises ConfigError where the folder holds no run, OSError where the page cannot be written.
    """
    found = findings.read(folder)
    path = found.run.folder / NAME if out is None else out
    content = page(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda partial: partial.write_bytes(content.encode("utf-8", "backslashreplace")))
    return Written(path, path.stat().st_size)


def page(found: Findings) -> str:
    """The whole page."""
    style, script = (_asset(name) for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    body = [
        measured.pictures(found),
        measured.tables(found),
        measured.guidance_curve(found),
        about.curves(found),
        about.time(found),
        about.distance(found),
        about.configuration(found),
        about.environment(found),
        about.what_next(found),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{text(policy)}">'
        f"<title>{text(found.run.folder.resolve().name)} – flowbp_ray</title><style>{style}</style>"
        "<noscript><style>.stack input,.all{display:none}.pair .stack{display:flex}"
        ".pair:not(.alone) .stack img{position:static;clip-path:none;width:50%}"
        ".pair:not(.alone) .stack .before{order:-1}.stack::before,.stack::after{display:none}</style></noscript></head>"
        f"<body>{_head(found)}<main>{''.join(body)}</main>{_foot()}<script>{script}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return (files("flowbp_ray.artifacts") / name).read_text(encoding="utf-8")


def _head(found: Findings) -> str:
    """Title, state, what was trained, the main figures, what to know first, and links to the sections."""
    config, seen = found.config, found.seen
    kind = "done" if found.finished else "on" if seen.stage == "running" else "stopped"
    method = (config.method or {}).get("name", "a method spelled out by axis") if config.method else ""
    what = f"{config.backbone.name} trained by {' and '.join(ways_of_learning(config))}"
    what += f" ({method})" if method else ""
    rewards = ", ".join(term.name for term in found.config.rewards.terms)
    took = format_duration(found.summary["seconds"]) if "seconds" in found.summary else ""
    steps, images = f"{seen.done} of {seen.steps} steps", f"{config.data.shape.batch} images a step"
    facts = [steps, images, f"seed {config.seed}", took]
    links = ("pictures", "measured", "guidance", "curves", "time", "distance", "training", "environment", "next")
    points = "".join(f"<li>{text(remark)}</li>" for remark in [*remarks(found), *seen.warnings])
    return (
        f'<header><h1>{text(found.run.folder.resolve().name)} <span class="state {kind}">{text(seen.state)}</span></h1>'
        f'<p class="what">{text(what)}, on {text(rewards)}</p>'
        f'<p class="facts">{" · ".join(text(fact) for fact in facts if fact)}</p>'
        f"{measured.cards(found)}"
        f"{f'<ul class=remarks>{points}</ul>' if points else ''}"
        f'<nav aria-label="sections">{"".join(f"<a href=#{name}>{name}</a>" for name in links)}</nav>'
        "</header>"
    )


def _foot() -> str:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return f"<footer>{note(f'Written {now} by flowbp_ray {__version__}: `flowbp-ray report`.')}</footer>"
