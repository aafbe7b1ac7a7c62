"""Another program on a run's Ray: it fills the object store, says so, and holds it until its standard input ends.

python -m tests.chaos.filler ADDRESS
"""

from __future__ import annotations

import logging
import os
import sys

os.environ["RAY_AUTH_MODE"] = "token"  # which a private Ray wants; both are read as Ray is imported
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # else 127.0.0.1 becomes the machine's address: nobody listens

import numpy as np
import ray

PIECE = 8 << 20  # bytes
TIMES = 1.5  # what the store holds


def main(address: str) -> None:
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    room = sum(node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes())
    held = []
    while len(held) * PIECE < TIMES * room:
        ref = ray.put(np.full(PIECE, len(held) % 250, np.uint8))
        held.append((ref, ray.get(ref)))  # in use, so that it cannot be spilled to the disk
    print(f"{len(held) * PIECE / 1e6:.0f} MB in a store of {room / 1e6:.0f} MB", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
