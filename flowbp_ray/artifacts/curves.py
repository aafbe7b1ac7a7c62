"""curves.png: what a run measured, over its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control import guard
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.files import naming


def plot_curves(run: Run) -> Path | None:
    """Draw curves.png and return its path; None where no step was logged.

    The training reward per step, what evaluations measured, and what judges answered about the evaluations' pictures.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    lines = run.metrics()
    train = [line for line in lines if line["kind"] == "train"]
    if not train:
        return None
    config = run.config
    panels = held_out_panels(config, lines)
    width = 4.4 * (1 + len(panels))
    figure, axes = plt.subplots(1, 1 + len(panels), figsize=(width, 3.6), layout="constrained", squeeze=False)
    left, *others = axes[0]
    for key in (k for k in train[0] if k.startswith("reward/")):
        left.plot([t["step"] + 1 for t in train], [t[key] for t in train], lw=1, label=key.removeprefix("reward/"))
    left.set(title="reward of the training batches", xlabel="step")
    left.legend()
    stopped = guard.read(run)
    for axis in axes[0]:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis, (kind, title, names) in zip(others, panels, strict=True):
        _plot_held_out(axis, [line for line in lines if line["kind"] == kind], names)
        axis.set(title=title, xlabel="step")
        if stopped:
            axis.axvline(stopped["step"], color="red", ls=":", label="ended by the guard")
            axis.axvline(stopped["best"], color="grey", ls=":", label="best by what is guarded")
        if axis.lines:
            axis.legend(fontsize=8)
    path = run.folder / "curves.png"
    with naming(path):
        figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def held_out_panels(config: RunConfig, lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """(kind of line, title, metrics) of each panel of what was measured on held-out prompts, where any of it was."""
    panels = [
        ("evaluation", "rewards on held-out prompts", [reward.name for reward in config.rewards.all]),
        ("evaluation", "share that the exact verifier accepts", ["verifier"]),
        ("judge", "judges on held-out prompts", config.judged),
    ]
    return [(kind, title, names) for kind, title, names in panels if _measured(lines, kind, names)]


def _measured(lines: Sequence[Mapping[str, Any]], kind: str, names: Sequence[str]) -> bool:
    """Whether a line of that kind has any of the metrics."""
    return any(line["kind"] == kind and name in line for line in lines for name in names)


def _plot_held_out(axis: Any, lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """One curve per metric and guidance; what has no finite value at a step is a gap."""
    for guidance in sorted({line["guidance"] for line in lines}):
        for name in names:
            mine = [line for line in lines if line["guidance"] == guidance and name in line]
            values = [np.nan if line[name] is None else line[name] for line in mine]
            if mine:
                axis.plot([m["step"] for m in mine], values, marker="o", label=f"{name}, guidance {guidance:g}")
