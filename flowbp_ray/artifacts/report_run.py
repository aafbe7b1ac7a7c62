"""The sections of a run's page about the run itself: curves, time, distance, configuration, environment, what next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowbp_ray.artifacts import charts
from flowbp_ray.artifacts.card import training_rows
from flowbp_ray.artifacts.card_phrases import describe_reading
from flowbp_ray.artifacts.curves import held_out_panels
from flowbp_ray.artifacts.findings import Findings, percent
from flowbp_ray.artifacts.markup import code, details, listing, note, section, table, text
from flowbp_ray.backbones import Backbone
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.observability.catalog import find
from flowbp_ray.observability.reader import format_duration

Line = Mapping[str, Any]
PROMPT = "a red circle"
ROLES = {"samplers": ("sampler_s", "load_s"), "rewards": ("reward_s",), "learners": ("learner_s",)}


def curves(found: Findings) -> str:
    """What was trained on, what was held out, and the optimizer, over the steps."""
    train, config = found.train, found.config
    if not train:
        return section("curves", "Curves", note("No step has been logged yet."))
    marks = _marks(found)
    parts = [_chart(found, "reward of the training batches", _family(train, "reward/"), marks)]
    for kind, title, names in held_out_panels(config, found.lines):
        lines = [line for line in found.lines if line["kind"] == kind]
        parts.append(_held_out(title, lines, names, marks))
    skills = [line for line in found.lines if line["kind"] == "evaluation" and line["guidance"] == found.guidance]
    names = [key for key in (skills[0] if skills else {}) if "/" in key and not key.endswith("/overall")]
    for root in dict.fromkeys(name.partition("/")[0] for name in names):
        mine = [name for name in names if name.startswith(f"{root}/")]
        parts.append(_held_out(f"{root} by skill, guidance {found.guidance:g}", skills, mine, marks))
    norm, limit = _values(train, "grad_norm"), config.learners.optimizer.max_grad_norm
    seen = [value for value in norm if math.isfinite(value)]
    limits = [charts.Mark(f"clipped above {limit:g}", y=limit)] if seen and limit < 3 * max(seen) else []
    parts.append(_chart(found, "gradient norm before clipping", {"grad_norm": norm}, [*marks, *limits]))
    parts.append(_chart(found, "loss", {name: _values(train, name) for name in ("loss", "nft_loss")}, marks))
    rates = {"learning_rate": _values(train, "learning_rate")}
    parts.append(_chart(found, "learning rate", rates, marks, smooth=False))
    about = "Thin: each step, in long runs the mean of neighbouring ones. Thick: a moving mean over a tenth of the run."
    return section("curves", "Curves", note(about), f'<div class="charts">{"".join(parts)}</div>')


def _marks(found: Findings) -> list[charts.Mark]:
    if found.verdict is None:
        return []
    named = {"ended by the guard": found.verdict["step"], "best by what is guarded": found.verdict["best"]}
    return [charts.Mark(name, x=float(step)) for name, step in named.items()]


def _chart(
    found: Findings,
    title: str,
    lines: Mapping[str, Sequence[float]],
    marks: Sequence[charts.Mark] = (),
    smooth: bool = True,
) -> str:
    """A chart over the steps, counted from 1 as `after how many steps`; names that no line has are left out."""
    steps = [line["step"] + 1 for line in found.train]
    series = [charts.Series(name, steps, values) for name, values in lines.items()]
    return charts.line_chart(title, series, marks=marks, smooth=smooth)


def _held_out(title: str, lines: Sequence[Line], names: Sequence[str], marks: Sequence[charts.Mark]) -> str:
    """A chart of what was measured on held-out prompts: a line per metric and guidance."""
    series, guidances = [], sorted({line["guidance"] for line in lines})
    for guidance in guidances:
        for name in names:
            mine = [line for line in lines if line["guidance"] == guidance and name in line]
            label = name.partition("/")[2] or name
            label += f", guidance {guidance:g}" if len(guidances) > 1 else ""
            series.append(charts.Series(label, [line["step"] for line in mine], _values(mine, name)))
    return charts.line_chart(title, series, percent=all(percent(name) for name in names), marks=marks)


def _family(train: Sequence[Line], prefix: str) -> dict[str, list[float]]:
    keys = dict.fromkeys(key for line in train for key in line if key.startswith(prefix))
    return {key.removeprefix(prefix): _values(train, key) for key in keys}


def _values(lines: Sequence[Line], key: str) -> list[float]:
    """The values of a key; NaN where a line has none that is finite."""
    return [float(v) if isinstance(v := line.get(key), int | float) else math.nan for line in lines]


def _median(lines: Sequence[Line], key: str) -> float | None:
    values = [v for v in _values(lines, key) if math.isfinite(v)]
    return float(np.median(values)) if values else None


def time(found: Findings) -> str:
    """Where the run's time went, and a step's, by role; images per second."""
    train, seconds = found.train, found.seen.status.seconds
    parts = []
    if seconds:
        whole = sum(seconds.values()) or 1.0
        rows = [[text(n), format_duration(s), f"{100 * s / whole:.0f} %", _bar(s / whole)] for n, s in seconds.items()]
        parts.append(table(["the run, by phase", "time", "share", ""], rows, "bars"))
    else:
        parts.append(note("The phases' times are not known: the folder has no status.json."))
    if not train:
        return section("time", "Time", *parts)
    keys = [key for key in ("step_s", "wait_s", "learn_s", "publish_s") if _median(train, key) is not None]
    longest = max([_median(train, key) or 0.0 for key in keys], default=0.0) or 1.0
    rows = []
    for key in keys:
        value, metric = _median(train, key) or 0.0, find(key)
        rows.append([text(metric.meaning if metric else key), f"{value:.2f} s", "", _bar(value / longest)])
    parts.append(table([f"a step, median of {len(train)}", "time", "", ""], rows, "bars"))
    parts.append(table(["role", "count", "busy in a step", "idle share"], _roles(train), "bars"))
    speed = found.summary.get("median_images_per_s", _median(train, "images_per_s"))
    facts = {"images per second, median": charts.number(speed) if speed is not None else ""}
    for key in ("travel_bytes_per_image", "weight_bytes", "embedding_bytes"):
        metric, size = find(key), _median(train, key)
        if metric is not None and size:
            facts[f"{metric.meaning}, median"] = _bytes(size)
    facts["calls done again"] = f"{train[-1].get('retries', 0):g}"
    facts["learners built again"] = f"{train[-1].get('incarnation', 0):g}"
    drawn = _chart(found, "images per second", {"images_per_s": _values(train, "images_per_s")})
    blocks = "".join(f"<div>{part}</div>" for part in [*parts, listing(facts)])
    return section("time", "Time", f'<div class="columns">{blocks}</div>', f'<div class="charts">{drawn}</div>')


def _roles(train: Sequence[Line]) -> list[list[str]]:
    rows = []
    for role, keys in ROLES.items():
        count, idle = _median(train, f"count/{role}"), _median(train, f"idle/{role}")
        busy = sum(_median(train, key) or 0.0 for key in keys)
        how = "the slowest" if role == "learners" else "all together"
        share = "not known" if idle is None else f"{100 * idle:.0f} %<br>{_bar(idle)}"
        rows.append([role, "" if count is None else f"{count:g}", f"{busy:.2f} s<small>{how}</small>", share])
    return rows


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * min(1.0, max(0.0, share)):.1f}%"></i></span>'


def _bytes(value: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"


def distance(found: Findings) -> str:
    """How far learners were from what samplers drew with, and from the base, where it was measured."""
    train, title = found.train, "Distance"
    keys = ("drift", "drift_max", "base_distance", "base_penalty", "old_distance")
    drawn = ""
    for key in keys:
        metric = find(key)
        if metric is not None and any(math.isfinite(v) for v in _values(train, key)):
            drawn += _chart(found, metric.meaning, {key: _values(train, key)}, _marks(found))
    missing = []
    if found.config.learners.base_penalty is None:
        missing.append(
            "The distance to the base was not measured (`learners.base_penalty.weight=0` does, at no effect)."
        )
    if not found.config.drift.on:
        missing.append("Drift, the distance between samplers and learners, was not measured (`drift.meter=true` does).")
    return section("distance", title, f'<div class="charts">{drawn}</div>' if drawn else "", *map(note, missing))


def configuration(found: Findings) -> str:
    """How it was trained, in the words of a model card, and config.yaml."""
    config, run = found.config, found.run
    backbone: Backbone | None
    try:
        backbone = build_backbone(config.backbone)
    except (ValueError, OSError):
        backbone = None
    rows = training_rows(run, backbone, found.seen.done, config.learners.ema is not None)
    rows.pop("everything else", None)
    prompts = f"`{config.data.prompts}`"
    rows["prompts"] = prompts + (f", {found.training_prompts}" if found.training_prompts is not None else "")
    rows |= {f"prompts, {name}": value for name, value in describe_reading(config).items()}
    whole = details("config.yaml, which train takes again", code((run.folder / "config.yaml").read_text()))
    missing = [] if backbone else [note("The base's folder is not on this machine; what only it knows is left out.")]
    return section("training", "How it was trained", listing(rows), *missing, whole)


def environment(found: Findings) -> str:
    """Digests, and by which command, with which versions and on which machine each start was made."""
    digest = run_file(found, "prompts.sha256")
    facts = {
        "folder": f"`{found.run.folder}`",
        "sha256 of the trained weights": f"`{weights}`" if (weights := found.summary.get("weights_sha256")) else "",
        "sha256 of the prompts": f"`{digest}`" if digest else "",
        "driver's host": found.seen.status.host if found.seen.status.began else "",
    }
    parts = [listing(facts)]
    if not found.starts:
        parts.append(note("The command, versions and commit were not recorded: the folder has no environment.jsonl."))
    for number, start in enumerate(reversed(found.starts)):
        versions = start.get("versions", {})
        parts.append(
            details(
                f"started {start.get('began', 'at an unknown time')}",
                listing(
                    {
                        "command": f"`{start.get('command', '')}`",
                        "in": f"`{start.get('folder', '')}`",
                        "on": f"{start.get('host', '')}, {start.get('cpus', '?')} CPUs, {start.get('system', '')}",
                        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
                        "git commit": f"`{start['git']}`" if start.get("git") else "not from a git checkout",
                    }
                ),
                opened=number == 0,
            )
        )
    return section("environment", "Environment", *parts)


def run_file(found: Findings, name: str) -> str:
    """The text of a small file in the run's folder; "" where there is none."""
    path = found.run.folder / name
    return path.read_text(errors="replace").strip() if path.is_file() else ""


def what_next(found: Findings) -> str:
    """The commands that make sense now."""
    folder, saved = found.run.folder, found.seen.checkpoint
    shown = shlex.quote(str(folder))
    parts = []
    if found.seen.stage == "running":
        parts += [note("It is going on. Watch it, and write this page again later:")]
        parts += [code(f"flowbp-ray status {shown} --watch\nflowbp-ray report {shown}")]
    elif not found.finished:
        parts.append(note("It did not reach its end. Go on from the newest checkpoint, or from the start without one:"))
        config, output = shlex.quote(str(folder / "config.yaml")), shlex.quote(f"output={folder.parent}")
        parts.append(code(f"flowbp-ray train {config} {output} resume=auto"))
    if saved is None:
        return section("next", "What next", *parts, note("There is no checkpoint yet, so nothing to draw or export."))
    prompt = next((record.text for record in found.prompts), PROMPT)
    ema = " --ema" if found.config.learners.ema is not None else ""
    export = shlex.quote(f"{folder}-export")
    parts.append(
        note(f"Draw your own prompts with the checkpoint of step {saved[0]}, and take it along for diffusers:")
    )
    parts.append(
        code(
            f"flowbp-ray sample {shown} -p {shlex.quote(prompt)} -o picture.png\n"
            f"flowbp-ray export {shown} --to {export}{ema}"
        )
    )
    return section("next", "What next", *parts)
