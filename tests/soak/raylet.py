"""What a raylet says of the object store and of each process's references, asked from outside as `ray memory` does.

Ray reads its token once in a process, so a process of its own asks: `python -m tests.soak.raylet GCS`, with the run's
environment. It answers each line that it reads with a line of JSON.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from tests.paths import ROOT

MIB = 2**20


@dataclass(frozen=True)
class Store:
    """used: MiB of objects in the store. references: objects that each process owns, by its id."""

    used: float
    objects: int
    references: dict[int, int]


class Raylet:
    """The raylet of a run on this machine. session: Ray's folder of this run. It is a context manager."""

    def __init__(self, process: psutil.Process, environment: Mapping[str, str]) -> None:
        command = " ".join(process.cmdline())
        [gcs] = set(re.findall(r"--gcs-address=(\S+)", command))
        self.session = re.findall(r"--session[_-]dir=(\S+)", command)[0]
        asks = [sys.executable, "-m", "tests.soak.raylet", gcs]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        own = {**environment, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # else 127.0.0.1 is taken for another address
        self.asks: Any = subprocess.Popen(asks, cwd=ROOT, env=own, **pipes)  # type: ignore[call-overload]

    def ask(self) -> Store | None:
        """None where it does not answer."""
        self.asks.stdin.write("\n")
        self.asks.stdin.flush()
        line = self.asks.stdout.readline()
        if not line:
            raise RuntimeError("the process that asks the raylet has ended")
        found = json.loads(line)
        if found is None:
            return None
        return Store(found["used"], found["objects"], {int(pid): owned for pid, owned in found["references"].items()})

    def __enter__(self) -> Raylet:
        return self

    def __exit__(self, *_: object) -> None:
        self.asks.stdin.close()
        self.asks.kill()
        self.asks.wait()
        self.asks.stdout.close()


def serve(gcs: str) -> None:
    """Answer until there is nothing to read."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.internal_api import get_state_from_address
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

    [node] = [node for node in get_state_from_address(gcs).node_table() if node["Alive"]]
    channel: Any = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    stub: Any = node_manager_pb2_grpc.NodeManagerServiceStub(channel)
    for _ in sys.stdin:
        try:
            reply = stub.GetNodeStats(node_manager_pb2.GetNodeStatsRequest(include_memory_info=False), timeout=10.0)
        except grpc.RpcError:
            print("null", flush=True)
            continue
        store = reply.store_stats
        answer = {
            "used": store.object_store_bytes_used / MIB,
            "objects": int(store.num_local_objects),
            "references": {worker.pid: int(worker.num_owned_objects) for worker in reply.core_workers_stats},
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
