"""The catalog of a run's metrics: each one's key, group, unit and meaning.

From it follow the trackers' groups, the names for Prometheus, Grafana's dashboard and the table of docs/observing.md.
All are gauges: a counter of Ray's is not exported while it is 0, where what is cumulative here (`retries`) begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "flowbp_ray_"
UNITS_IN_NAMES = ("seconds", "bytes", "share", "items", "processes")


@dataclass(frozen=True)
class Metric:
    """A number of metrics.jsonl. A key that ends in /* is a family: what stands for * becomes a tag, not a name."""

    key: str
    group: str
    unit: str
    meaning: str
    tags: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """The key without /*."""
        return self.key.removesuffix("/*")

    @property
    def exported(self) -> str:
        """Its name for Ray, which puts `ray_` before it: `wait_s` becomes flowbp_ray_wait_seconds."""
        stem = self.stem.removesuffix("_s") if self.unit == "seconds" else self.stem
        return PREFIX + (f"{stem}_{self.unit}" if self.unit in UNITS_IN_NAMES and self.unit not in stem else stem)

    @property
    def scraped(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.exported}"


TABLE = (
    Metric("step", "progress", "", "which step the numbers are of, from 0"),
    Metric("version", "progress", "", "version of the weights that the batch was drawn with"),
    Metric("incarnation", "progress", "", "how often the learners were built again"),
    Metric("images_per_s", "throughput", "images/s", "training images per second, as the driver sees it"),
    Metric("step_s", "time", "seconds", "a whole step: waiting, learning and publishing"),
    Metric("wait_s", "time", "seconds", "the driver waited for samplers and reward servers"),
    Metric("learn_s", "time", "seconds", "the driver waited for the learners' optimizer step"),
    Metric("publish_s", "time", "seconds", "the driver waited until the new weights were published"),
    Metric("evaluate_s", "time", "seconds", "evaluating, between the last step and this one"),
    Metric("save_s", "time", "seconds", "saving checkpoints, between the last step and this one"),
    Metric("sampler_s", "time", "seconds", "samplers rolled out, summed over processes"),
    Metric("load_s", "time", "seconds", "samplers loaded weights, summed over processes"),
    Metric("reward_s", "time", "seconds", "reward servers scored, summed over processes"),
    Metric("learner_s", "time", "seconds", "the slowest learner computed"),
    Metric("idle/*", "idle", "share", "of the step in which the role's processes did not compute", ("role",)),
    Metric("queue/*", "queue", "items", "items by stage, mean over the step; silent: actors that are", ("stage",)),
    Metric("retries", "queue", "", "calls done again since the driver started"),
    Metric("count/*", "count", "processes", "processes of a role", ("role",)),
    Metric("drift", "drift", "", "distance between the sampler's velocities and the learner's, mean over the batch"),
    Metric("drift_max", "drift", "", "the largest drift in the batch"),
    Metric("item_bytes_per_image", "bytes", "bytes", "items themselves, per image"),
    Metric("state_bytes_per_image", "bytes", "bytes", "states from sampler to learner, per image"),
    Metric("velocity_bytes_per_image", "bytes", "bytes", "the drift meter's velocities, per image"),
    Metric("forward_bytes_per_image", "bytes", "bytes", "sample and old velocities for terms without gradient"),
    Metric("base_bytes_per_image", "bytes", "bytes", "the base's velocities, per image"),
    Metric("target_bytes_per_image", "bytes", "bytes", "targets from sampler to reward server, per image"),
    Metric("cotangent_bytes_per_image", "bytes", "bytes", "cotangents from reward server to learner, per image"),
    Metric("travel_bytes_per_image", "bytes", "bytes", "all that travels with an image"),
    Metric("state_bytes_per_image_formula", "bytes", "bytes", "states by formula, per image"),
    Metric("weight_bytes", "bytes", "bytes", "weights that samplers loaded, per step"),
    Metric("embedding_bytes", "bytes", "bytes", "embeddings that reached samplers, per step"),
    Metric("reward/*", "reward", "", "training reward, mean over the batch", ("reward",)),
    Metric("clipped/*", "reward", "share", "rows at or above the clip, which give no gradient", ("reward",)),
    Metric("reward_share/*", "reward", "", "what the reward's cotangent is multiplied by", ("reward",)),
    Metric("reward_grad_norm/*", "reward", "", "norm of the reward's gradient at the images", ("reward",)),
    Metric("reward_grad_cosine/*", "reward", "", "cosine between two rewards' gradients", ("pair",)),
    Metric("unscored/*", "reward", "", "images that a judge to learn from could not score", ("judge",)),
    Metric("nft_alike", "reward", "share", "of the prompts, whose images all have the same scores"),
    Metric("nft_unscored", "reward", "share", "of the prompts, left out for want of scores or images"),
    Metric("gate/*", "reward", "", "mean weight that a judge gave", ("judge",)),
    Metric("loss", "loss", "", "the rewards' loss"),
    Metric("base_penalty", "loss", "", "what the distance to the base adds to the loss"),
    Metric("nft_loss", "loss", "", "loss of the terms without gradient"),
    Metric("old_distance", "loss", "", "distance to the sampling policy's velocities, root mean square"),
    Metric("base_distance", "loss", "", "distance to the base's velocities at base_penalty.guidance, root mean square"),
    Metric("grad_norm", "gradient", "", "norm of the gradient before clipping"),
    Metric("grad_clipped", "gradient", "", "1 where the norm was above the limit"),
    Metric("updated", "gradient", "", "1 where the weights changed"),
    Metric("learning_rate", "gradient", "", "learning rate of the step"),
    Metric("forwards", "gradient", "", "forwards of the learners, summed over ranks"),
    Metric("padding_rows", "gradient", "", "rows of those forwards that count for nothing"),
    Metric("kept", "sample", "share", "rows of the batch that count"),
    Metric("faults", "sample", "", "values that were not finite"),
    Metric("omega", "sample", "", "mean weight of the samples"),
    Metric("d_j", "sample", "", "mean residual of the junction"),
    Metric("d_0", "sample", "", "mean residual of the start"),
    Metric("evaluation/*", "evaluation", "", "held-out prompts: means, those of judges too", ("metric", "guidance")),
)  # fmt: skip

ABOUT = {"guidance", "judge", "pictures", "missing"}  # keys of an evaluation's line that are no metrics
EVALUATED = TABLE[-1]
_PLAIN = {metric.key: metric for metric in TABLE if not metric.tags}
_FAMILY = {metric.stem: metric for metric in TABLE if len(metric.tags) == 1}


@dataclass(frozen=True)
class Reading:
    """A number with its metric and the values of the metric's tags."""

    metric: Metric
    tags: Mapping[str, str]
    value: float


def find(key: str) -> Metric | None:
    """The metric of a key in a training step's line; None where the catalog has none."""
    stem, of, _ = key.partition("/")
    return _FAMILY.get(stem) if of else _PLAIN.get(key)


def readings(kind: str, values: Mapping[str, Any]) -> Iterator[Reading]:
    """The numbers of a line of metrics.jsonl that are exported; of an evaluation, the metrics over all prompts."""
    for key, value in values.items():
        if not isinstance(value, int | float):
            continue
        if kind != "train":
            if key not in ABOUT and "/" not in key:
                yield Reading(EVALUATED, {"metric": key, "guidance": f"{values['guidance']:g}"}, value)
        elif (metric := find(key)) is not None:
            yield Reading(metric, {tag: key.partition("/")[2] for tag in metric.tags}, value)


def grouped(kind: str, values: Mapping[str, Any], main: float | None = None) -> dict[str, float]:
    """The numbers of a line by their names in trackers: time/wait_s, idle/samplers, evaluation/verifier.

    main: the first guidance of evaluations. Those at another one are a group of their own, evaluation_guidance_3.
    """
    found = {}
    if kind != "train" and main is not None and values.get("guidance", main) != main:
        kind = f"{kind}_guidance_{values['guidance']:g}"
    for key, value in values.items():
        if isinstance(value, int | float):
            metric = find(key) if kind == "train" else None
            group = kind if metric is None else metric.group
            found[f"{group}/{key.removeprefix(f'{group}/')}"] = value
    return found


def markdown() -> str:
    """The table of docs/observing.md: `python -m flowbp_ray.observability.catalog`."""
    lines = ["| Prometheus | tags besides `run` | in metrics.jsonl | in trackers | what |", "|---|---|---|---|---|"]
    for metric in TABLE:
        tracked = (
            next(iter(grouped("train", {metric.key: 0.0}))) if metric is not EVALUATED else "evaluation/*`, `judge/*"
        )
        where = "lines of evaluations and judges" if metric is EVALUATED else f"`{metric.key}`"
        lines.append(f"| `{metric.scraped}` | {', '.join(metric.tags)} | {where} | `{tracked}` | {metric.meaning} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
