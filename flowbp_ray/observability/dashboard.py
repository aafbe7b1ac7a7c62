"""Grafana's dashboard, made from the catalog. To write it anew:

    python -m flowbp_ray.observability.dashboard > deploy/grafana-dashboard.json

It can be imported as it is: it needs only a Prometheus data source, and its variable `run` lists the runs there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from flowbp_ray.observability.catalog import TABLE, Metric

UNITS = {"seconds": "s", "bytes": "bytes", "share": "percentunit"}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
HEIGHT, WIDTH = 8, 12  # of a panel; the screen is 24 wide


@dataclass(frozen=True)
class Panel:
    """Metrics of the catalog, by key, that are drawn into one picture; all have one unit.

    stacked: draw them on top of each other. about: the description that Grafana shows. among: a matcher for the tag,
    where not all of its values are drawn.
    """

    title: str
    keys: Sequence[str]
    stacked: bool = False
    about: str = ""
    among: str = ""


PANELS = (
    Panel("Images per second", ["images_per_s"]),
    Panel("Step", ["step"]),
    Panel("A step's phases", ["wait_s", "learn_s", "publish_s"], stacked=True, about="As the driver sees them."),
    Panel("Between steps", ["evaluate_s", "save_s"], stacked=True),
    Panel("Idle share per role", ["idle/*"], about="Of a step's time, in which the role's processes did not compute."),
    Panel("Seconds of work per step", ["sampler_s", "load_s", "reward_s", "learner_s"]),
    Panel("Queue", ["queue/*"], stacked=True, about="Items at each stage, mean over a step.", among='!="silent"'),
    Panel("Trouble", ["retries", "incarnation", "faults"], about="Calls done again; learners built again; not finite."),
    Panel("Processes", ["count/*"]),
    Panel("Actors that do not answer", ["queue/*"], among='="silent"'),
    Panel("Training rewards", ["reward/*"]),
    Panel("Evaluations", ["evaluation/*"], about="Means over the held-out prompts; shares are 0 to 1."),
    Panel("Drift", ["drift", "drift_max"]),
    Panel("Distance to the base", ["base_distance", "base_penalty"]),
    Panel("Distance to the sampling policy", ["old_distance"], about="Of terms without gradient."),
    Panel("Loss", ["loss", "nft_loss"]),
    Panel("Norm of the gradient", ["grad_norm"]),
    Panel("Share of rows", ["kept", "clipped/*"], about="That count, and that are at or above the clip."),
    Panel("Pull of the rewards", ["reward_grad_norm/*", "reward_share/*"]),
    Panel("Prompts without signal", ["nft_alike", "nft_unscored"], about="For terms without gradient."),
    Panel("Images that a judge did not score", ["unscored/*"]),
    Panel(
        "Bytes per image",
        [m.key for m in TABLE if m.key.endswith("_bytes_per_image") and not m.key.startswith("travel")],
        stacked=True,
        about="What travels with an image; their sum is travel_bytes_per_image.",
    ),
    Panel("Bytes per step", ["weight_bytes", "embedding_bytes"]),
)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    return {
        "title": "flowbp_ray",
        "uid": "flowbp-ray",
        "tags": ["flowbp_ray", "ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "annotations": {"list": []},
        "templating": {"list": [_datasource(), _run()]},
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1}


def _run() -> dict[str, Any]:
    """The variable `run`: the runs that Prometheus knows, of which several may be chosen."""
    query = f"label_values({_metric('step').scraped}, run)"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": "run"},
        "refresh": 2,
        "sort": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {},
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    unit = _metric(panel.keys[0]).unit
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": number % 2 * WIDTH, "y": number // 2 * HEIGHT},
        "targets": [_target(panel, key, ascii_uppercase[i]) for i, key in enumerate(panel.keys)],
        "fieldConfig": {
            "defaults": {
                "unit": UNITS.get(unit, "short"),
                "custom": {
                    "drawStyle": "line",
                    "fillOpacity": 40 if panel.stacked else 0,
                    "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
                },
            },
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "none"},
        },
    }


def _target(panel: Panel, key: str, letter: str) -> dict[str, Any]:
    """One series per run and tag. max: over the driver's other tags, which change where it moves to another node."""
    metric = _metric(key)
    chosen = "".join(f", {tag}{panel.among}" for tag in metric.tags) if panel.among else ""
    legend = " ".join(["{{run}}", *(f"{{{{{tag}}}}}" for tag in metric.tags)])
    return {
        "refId": letter,
        "datasource": SOURCE,
        "expr": f'max by ({", ".join(["run", *metric.tags])}) ({metric.scraped}{{run=~"$run"{chosen}}})',
        "legendFormat": legend + ("" if metric.tags and len(panel.keys) == 1 else f" {metric.stem}"),
    }


def _metric(key: str) -> Metric:
    return next(metric for metric in TABLE if metric.key == key)


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))
