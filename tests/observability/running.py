"""A run on a Ray that collects metrics and profiles, which goes on until it is killed.

A process of its own: Ray reads what it needs for both when it starts. What a test looks at is written to the folder
after step 2: what the metrics agent serves, and the timeline.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from pathlib import Path

os.environ |= {
    "RAY_PROFILING": "1",
    "RAY_task_events_report_interval_ms": "1000",  # a Ray before it in the parent's process may have set 0
    "RAY_metrics_report_interval_ms": "1000",
    "RAY_enable_metrics_collection": "1",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_num_workers_soft_limit": "0",
}

import ray

from flowbp_ray import driver
from flowbp_ray.driver import Loop
from tests.driver.chaos import before_step
from tests.small import small_config

LAST = "ray_flowbp_ray_step{"
AT = 2
TERMS = "rewards.terms=[{name: shapes_clip}, {name: shapes_clip_heldout, weight: 0.5}]"
SETTINGS = [
    *("evaluation.prompts=shapes:dev", "evaluation.limit=4", "evaluation.every=1", "evaluation.batch=2"),
    *("steps=1000", "staleness=1", "checkpoint.every=1", "drift.meter=true", "learners.base_penalty.weight=1"),
    *(TERMS, "rewards.balance=grad_norm", "name=seen"),
]


def scraped() -> str:
    """What the metrics agent serves, once it has the last step."""
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    for _ in range(60):
        time.sleep(0.5)
        with urllib.request.urlopen(address, timeout=30) as answer:
            text: str = answer.read().decode()
        if any(line.startswith(LAST) and float(line.split()[-1]) == AT - 1 for line in text.splitlines()):
            break
    return text


def look(loop: Loop) -> None:
    (loop.run.folder / "scraped.txt").write_text(scraped())
    partial = loop.run.folder / "timeline.partial"
    partial.write_text(json.dumps(ray.timeline()))
    partial.rename(loop.run.folder / "timeline.json")


if __name__ == "__main__":
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with before_step(AT, look):
        driver.train(small_config(Path(sys.argv[1]), "flowbp_sparse", *SETTINGS))
