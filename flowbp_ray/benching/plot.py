"""bench.png: throughput over the number of samplers; measured, ideal and predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from flowbp_ray.benching.points import Point, Ratio
from flowbp_ray.benching.predict import Seconds


def plot_throughput(
    points: Sequence[Point], seconds: Seconds, ideal: Callable[[Ratio], float], title: str, path: Path
) -> Path:
    """Draw one colour for each (learners, reward servers, staleness); lines run over all numbers of samplers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    groups: dict[tuple[int, int, int], list[Point]] = {}
    for p in points:
        groups.setdefault((p.ratio.learners, p.ratio.rewards, p.ratio.staleness), []).append(p)
    most = max(p.ratio.samplers for p in points)
    for number, ((learners, rewards, staleness), mine) in enumerate(groups.items()):
        colour, batch = f"C{number % 10}", mine[0].batch
        across = [replace(mine[0].ratio, samplers=m) for m in range(1, most + 1)]
        counts = [ratio.samplers for ratio in across]
        label = f"{learners} learners, {rewards} rewards, S = {staleness}"
        axis.plot([p.ratio.samplers for p in mine], [p.images_per_s for p in mine], "o", color=colour, label=label)
        axis.plot(counts, [batch / seconds.step(ratio) for ratio in across], "-", color=colour, lw=1)
        axis.plot(counts, [batch / ideal(ratio) for ratio in across], ":", color=colour, lw=1)
    axis.plot([], [], "k-", lw=1, label="predicted, fitted on one point")
    axis.plot([], [], "k:", lw=1, label="ideal: computing only")
    if most > 1:
        axis.set_xscale("log", base=2)
        axis.set_xticks([2**i for i in range(most.bit_length())], [str(2**i) for i in range(most.bit_length())])
    axis.set(title=title, xlabel="samplers", ylabel="images per second")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
