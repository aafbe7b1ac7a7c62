"""What a raylet says of the object store and of each process's references, asked from outside as `ray memory` does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import psutil
from ray._private.grpc_utils import init_grpc_channel
from ray._private.internal_api import get_state_from_address
from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

MIB = 2**20


@dataclass(frozen=True)
class Store:
    """used: MiB of objects in the store. references: objects that each process owns, by its id."""

    used: float
    objects: int
    references: dict[int, int]


class Raylet:
    """The raylet of a run on this machine. RAY_AUTH_TOKEN_PATH must name the token that the run has."""

    def __init__(self, process: psutil.Process) -> None:
        command = " ".join(process.cmdline())
        [gcs] = set(re.findall(r"--gcs-address=(\S+)", command))
        self.session = re.findall(r"--session[_-]dir=(\S+)", command)[0]
        state = get_state_from_address(gcs)
        [node] = [node for node in state.node_table() if node["Alive"]]
        state.disconnect()
        channel: Any = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
        self.stub: Any = node_manager_pb2_grpc.NodeManagerServiceStub(channel)

    def ask(self) -> Store:
        """Raises grpc.RpcError where it does not answer within ten seconds."""
        request = node_manager_pb2.GetNodeStatsRequest(include_memory_info=False)
        reply = self.stub.GetNodeStats(request, timeout=10.0)
        owned = {worker.pid: int(worker.num_owned_objects) for worker in reply.core_workers_stats}
        store = reply.store_stats
        return Store(store.object_store_bytes_used / MIB, int(store.num_local_objects), owned)
