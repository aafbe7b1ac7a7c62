"""Ray itself may fail under a run: then the run ends, and one line says what happened.

Without its raylet or its GCS a private Ray is lost. Calls would fail one after the other or hang, and after a minute
without a GCS Ray ends this process without a word. So both are watched.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError

from actors.errors import cause
from flowbp_ray.observability.progress import Progress
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.utils.secrets import hidden

NAMES = {"raylet": "raylet", "gcs_server": "GCS"}


@contextmanager
def watched(run: Run, progress: Progress) -> Iterator[None]:
    """Inside the context the failure of Ray ends the run.

    Where a daemon of a private Ray ends, the process ends at once, with exit code 1: as after a SIGKILL, what Ray had
    started ends with it, and the checkpoints are whole. Raises RunFailed for an error of Ray that nobody has caught.
    """
    on = f"name={run.folder.name} resume=auto goes on from the last checkpoint"

    def end(name: str, pid: int) -> None:
        sys.stdout.flush()
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  Ray prints twenty lines of the raylet's log there
        error = RunFailed(f"the {name} of this run's Ray (process {pid}) has ended; see {logs()}; {on}")
        run.end(error)
        progress.__exit__(RunFailed, error, None)
        print(f"flowbp-ray: {hidden(str(error))}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

    with Watch(daemons(), end):
        try:
            yield
        except RayError as error:
            raise RunFailed(f"Ray failed: {type(error).__name__}: {cause(error)}; {on}") from error


class Watch(threading.Thread):
    """Inside the context, calls `end` in a thread with the name and process id of the first daemon that ends."""

    def __init__(self, pids: Mapping[str, int], end: Callable[[str, int], object]) -> None:
        """pids: of running processes, by name."""
        super().__init__(daemon=True)
        self.end = end
        self.ended = {os.pidfd_open(pid): (name, pid) for name, pid in pids.items()}
        self.wake, self.awake = os.pipe()

    def run(self) -> None:
        ready = select.select([*self.ended, self.wake], [], [])[0]
        if self.wake not in ready:
            self.end(*self.ended[ready[0]])

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.awake)
        self.join()
        for handle in (*self.ended, self.wake):
            os.close(handle)


def daemons() -> dict[str, int]:
    """Process ids of the raylet and the GCS that this process has started, by name: none in a joined cluster."""
    node: Any = getattr(ray._private.worker, "_global_node", None)
    started: dict[str, Any] = getattr(node, "all_processes", {})
    return {name: started[kind][0].process.pid for kind, name in NAMES.items() if started.get(kind)}


def logs() -> str:
    """The folder of this Ray's logs."""
    node: Any = getattr(ray._private.worker, "_global_node", None)
    return str(node.get_logs_dir_path()) if node is not None else "Ray's logs"
