"""A run at MLflow: in the store of MLFLOW_TRACKING_URI, else in a database beside the runs."""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowbp_ray.observability.destinations import Shown
from flowbp_ray.run.pictures import grid

TAG = "flowbp_ray.run"  # holds the run's id, by which it is found when it goes on
PATIENCE = 60.0  # seconds for what is left, at the end
LONGEST, AT_ONCE = 500, 100  # characters of a parameter, and parameters of a request, that every server takes
WAITING = 1000  # calls that may wait for the server


class MlflowRun:
    """Sends numbers and pictures from a thread of its own, so that no step waits for the server.

    A metric's history cannot be taken back: steps that a resumed run makes again have two values there.
    """

    name = "mlflow"

    def __init__(self, folder: Path, project: str, run_id: str, config: Mapping[str, Any]) -> None:
        """project: the experiment. Finds the run with the tag of `run_id` in it, or makes one with the configuration.

        Raises MLflow's own error where the store does not answer.
        """
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # by default it tries for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow.tracking import MlflowClient

        here = folder.resolve().parent
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{here / 'mlflow.db'}"
        self.client: Any = MlflowClient(tracking_uri=uri)
        self.run = self._run(project, folder, run_id, config, here if uri.startswith("sqlite:") else None)
        self.calls: queue.Queue[Callable[[], object] | None] = queue.Queue(WAITING)
        self.failed: BaseException | None = None
        self.thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self.thread.start()

    def _run(self, project: str, folder: Path, run_id: str, config: Mapping[str, Any], local: Path | None) -> str:
        from mlflow.entities import Param

        experiment = self._experiment(project, local)
        known = self.client.search_runs([experiment], f"tags.`{TAG}` = '{run_id}'", max_results=1)
        if known:
            self.client.update_run(known[0].info.run_id, status="RUNNING")
            return str(known[0].info.run_id)
        made = self.client.create_run(experiment, run_name=folder.name, tags={TAG: run_id})
        plain = [Param(allowed(key), str(value)[:LONGEST]) for key, value in flat(config)]
        for first in range(0, len(plain), AT_ONCE):
            self.client.log_batch(made.info.run_id, params=plain[first : first + AT_ONCE])
        return str(made.info.run_id)

    def _experiment(self, project: str, local: Path | None) -> str:
        """The id of the experiment, which another run may make at the same time."""
        for _ in range(2):
            if found := self.client.get_experiment_by_name(project):
                return str(found.experiment_id)
            place = None if local is None else (local / "mlartifacts").as_uri()
            try:
                return str(self.client.create_experiment(project, artifact_location=place))
            except Exception as error:  # MLflow's class of errors is not imported here
                last = error
        raise last

    def log(self, step: int, kind: str, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(allowed(name), float(value), now, step) for name, value in numbers.items()]
        self._later(lambda: self.client.log_batch(self.run, metrics=metrics))

    def show(self, step: int, shown: Shown) -> None:
        """A sheet with the prompts below the pictures, which MLflow shows by step, and the prompts in full, a file."""
        sheet = np.asarray(grid(shown.pictures, shown.prompts, columns=4))
        name = f"prompts/step_{step:06d}_guidance_{shown.guidance:g}.json"
        self._later(lambda: self.client.log_image(self.run, sheet, key=allowed(shown.name), step=step))
        self._later(lambda: self.client.log_dict(self.run, {"prompts": list(shown.prompts)}, name))

    def rewind(self, step: int) -> None:
        """Nothing: the same run goes on."""

    def close(self) -> None:
        """Wait for what is left, but not for a server that is gone."""
        if self.failed is None:
            self._later(lambda: self.client.set_terminated(self.run, "FINISHED"))
            self.calls.put(None, timeout=PATIENCE)
            self.thread.join(PATIENCE)
        if self.failed is not None:
            raise self.failed

    def _later(self, call: Callable[[], object]) -> None:
        """Raises what an earlier call failed with, and queue.Full where the server is too slow by far."""
        if self.failed is not None:
            raise self.failed
        self.calls.put_nowait(call)

    def _send(self) -> None:
        while (call := self.calls.get()) is not None:
            try:
                call()
            except Exception as error:  # it is raised where the next number comes
                self.failed = error
                return


def allowed(name: str) -> str:
    """The name with _ for each character that MLflow does not take in one."""
    return re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)


def flat(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a configuration by their dotted keys."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
