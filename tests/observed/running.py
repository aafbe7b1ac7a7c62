"""Two runs on a Ray that collects metrics and profiles: one to its end, one that goes on until it is killed.

A process of its own: Ray reads what it needs for both when it starts. What a test looks at is written to the folder.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

os.environ |= {
    "RAY_PROFILING": "1",
    "RAY_metrics_report_interval_ms": "1000",
    "RAY_enable_metrics_collection": "1",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_num_workers_soft_limit": "0",
}

import ray

from flowbp_ray import driver
from flowbp_ray.driver import Loop
from flowbp_ray.run import Run
from tests.small import small_config

LAST = "ray_flowbp_ray_step"
EVALUATED = ["evaluation.prompts=shapes:dev", "evaluation.limit=4", "evaluation.every=1", "evaluation.batch=2"]
FULL = [*EVALUATED, "staleness=1", "checkpoint.every=1", "drift.meter=true", "learners.base_penalty.weight=1"]


def scraped(run: Run) -> str:
    """What the metrics agent serves once it has the last step. A run's numbers are there as long as it goes on."""
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    last = [line["step"] for line in run.metrics() if line["kind"] == "train"][-1]
    for _ in range(60):
        time.sleep(1)
        with urllib.request.urlopen(address, timeout=10) as answer:
            text: str = answer.read().decode()
        if any(line.startswith(LAST) and float(line.split()[-1]) == last for line in text.splitlines()):
            break
    return text


def main(folder: Path) -> None:
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    finish = Loop.finish

    def scrape(loop: Loop) -> dict[str, Any]:
        (folder / "scraped.txt").write_text(scraped(loop.run))
        return finish(loop)

    Loop.finish = scrape  # type: ignore[method-assign]
    driver.train(small_config(folder, "flowbp_sparse", *FULL, "name=whole"))
    Loop.finish = finish  # type: ignore[method-assign]
    (folder / "timeline.json").write_text(json.dumps(ray.timeline()))
    driver.train(small_config(folder, "flowbp_sparse", "steps=1000", "name=killed", "checkpoint.every=1"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
