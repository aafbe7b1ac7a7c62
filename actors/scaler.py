"""Changes the sizes of the pools between two steps, as decided by `flowbp_ray.control.scaling`."""

from __future__ import annotations

from collections.abc import Mapping

from actors.elastic_pool import ElasticPool
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control import scaling
from flowbp_ray.run.folder import Run


class Scaler:
    """Resizes the pools of samplers and reward servers. pools: role -> pool."""

    def __init__(self, config: RunConfig, run: Run, pools: Mapping[str, ElasticPool]) -> None:
        self.config, self.run, self.pools = config, run, pools
        self.steps: list[Mapping[str, float]] = []  # the last since the last change, as many as the rule reads
        self.served = self.serving

    @property
    def counts(self) -> dict[str, int]:
        """Role -> the number of active actors, those that are still starting included."""
        return {role: len(pool.active) for role, pool in self.pools.items()}

    @property
    def serving(self) -> dict[str, int]:
        """Role -> the number of actors that have been ready, at least 1; new ones may be starting or not placed."""
        return {role: max(1, len(pool.serving)) for role, pool in self.pools.items()}

    def metrics(self) -> dict[str, float]:
        """`count/<role>`, for the step's line in metrics.jsonl."""
        counts = {**self.counts, "learners": self.config.learners.count}
        return {f"count/{role}": float(count) for role, count in counts.items()}

    def between(self, step: int, metrics: Mapping[str, float]) -> None:
        """After step `step`, apply the requests of `flowbp-ray scale`, or else the rule."""
        log = self.run.logger()
        for pool in self.pools.values():
            pool.dismiss()
            pool.complain(log)
        if step + 1 >= self.config.steps:
            return
        self.steps = [*self.steps, metrics][-scaling.WINDOW :] if self.serving == self.served else []
        self.served = self.serving
        asked, why = scaling.take_requests(self.run), "asked for"
        if not asked and self.config.cluster.scaling == "rule":
            asked, why = scaling.rule(self.config, self.counts, self.serving, self.steps), "by rule"
        for role, size in asked.items():
            before, (least, most) = self.counts[role], getattr(self.config, role).bounds
            self.pools[role].resize(min(max(size, least), most))
            log.info("after step %d: %s %d -> %d, %s", step, role, before, self.counts[role], why)
            self.served = self.serving
        if asked:
            self.steps = []
