"""python -m benchmarks.weight_sync: what it takes to publish weights and to load them, by both transports.

A learner's actor with an engine on random weights publishes through `actors.transport.publish`, a sampler's actor loads
through `actors.transport.load`; in turn with these the same learner does `ray.put` of one array of as many bytes, and
the same sampler `ray.get`, and broadcasts the weights as `cluster.transport: nccl` does (here by gloo) to another
sampler's actor. The learner has touched the whole store before: what is touched for the first time costs ten
times as much, and on which side that happens would be chance. One node, an otherwise idle machine. Prints a table on
stderr and JSON on stdout.

publish_s, put_s: inside the learner, from the call until the last byte is in the store. load_s, get_s: inside the
    sampler, until every byte can be read. ratio: (put + get) / (publish + load), the median over the pairs: the share
    of Ray's own throughput.
copy_s: inside the sampler, copying what was loaded into the module's parameters. broadcast_s: inside the learner, from
    the call of the sampler until that has said that its parameters hold the weights. gain: (publish + load + copy) /
    broadcast, the median over the pairs.
publish_wall_s, put_wall_s: what the driver sees, with the calls' way there and back.
install_s, fingerprint_s, checksums_s: beside the transfer, what a sampler does with its first version (copying it into
    the module, whose memory is laid out then; stating what it holds) and a learner (stating what its masters are).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import ray
import torch
from torch import nn

from actors import transport
from actors.learner import LearnerActor
from actors.process import thread_env
from flowbp_ray.config import loading
from flowbp_ray.learning.engine import TorchEngine
from flowbp_ray.learning.learner import Learner
from flowbp_ray.messages import Version
from flowbp_ray.utils.checksums import combine
from flowbp_ray.weights import trainable
from flowbp_ray.weights.broadcast import Delivery
from flowbp_ray.weights.buckets import assign_buckets
from flowbp_ray.weights.fingerprint import fingerprint
from flowbp_ray.weights.inbox import Inbox
from flowbp_ray.weights.packing import Packer, Receiver

WIDTH = 1536  # SD3.5-M's
RANK = 16
STORE, WARM = (
    3.0,
    0.85,
)  # so many of the largest Ray's store has room for at a time; the part that is written beforehand
TIMEOUT = 600.0  # seconds
PAUSE = 0.3  # seconds after each side, in which Ray frees what nobody refers to


def module(mb: float) -> nn.Module:
    """Random bf16 weights of `mb` million bytes: up to 20 adapters of rank 16, above that blocks like SD3.5-M's."""
    left = int(mb * 1e6) // 2
    w = WIDTH
    adapters = [(RANK, w), (w, RANK)] * 4
    block = [(w, w), (w,)] * 4 + [(4 * w, w), (4 * w,), (w, 4 * w), (w,), (6 * w, w), (6 * w,)]
    shapes: list[tuple[int, ...]] = []
    while left > 0:
        for shape in adapters if mb <= 20 else block:
            size = min(left, int(np.prod(shape)))
            if size:
                shapes.append(shape if size == np.prod(shape) else (size,))
            left -= size
    made = nn.Module()
    for number, shape in enumerate(shapes):
        made.register_parameter(f"w{number}", nn.Parameter(torch.empty(shape, dtype=torch.bfloat16).normal_()))
    return made


class Publisher(LearnerActor):
    """A learner rank that has weights and no model."""

    def hold(self, mb: float) -> tuple[int, int]:
        """Make the weights; returns how many bytes and tensors."""
        torch.set_num_threads(1)
        learner = Learner.__new__(Learner)
        learner.rank = 0
        self.config = loading.load("shapes_flowbp_sparse", ["learners.engine=torch", "learners.count=1"])
        learner.config = self.config.learners
        learner.engine = TorchEngine(module(mb), learner.config)
        sizes = learner.engine.sizes()
        learner.buckets, learner.packer = assign_buckets(sizes), Packer()
        self.learner = learner
        # torch's memory, as the weights are in: numpy's lies in huge pages where it can, and is read faster
        self.raw = torch.randint(0, 255, (sum(sizes.values()),), dtype=torch.uint8).numpy()
        return sum(sizes.values()), len(sizes)

    def put(self) -> tuple[float, list[Any]]:
        started = time.perf_counter()
        reference = ray.put(self.raw)
        return time.perf_counter() - started, [reference]

    def timed_checksums(self) -> float:
        started = time.perf_counter()
        self.learner.checksums()
        return time.perf_counter() - started


class Loader:
    """A sampler that has weights and no model."""

    def hold(self, mb: float) -> None:
        torch.set_num_threads(1)
        self.module = module(mb)
        self.receiver = Receiver(self.module)

    def sit(self, address: str, port: int) -> None:
        self.inbox = Inbox(self.receiver, address, port, "sampler", threading.Lock())

    def holds(self, version: Version) -> str:
        """The fingerprint of what came as `version` by broadcast."""
        if not self.inbox.install(version):
            raise RuntimeError(f"version {version.step} did not arrive")
        return fingerprint(trainable.trained(self.module))

    def load(self, held: transport.Refs, first: bool) -> dict[str, Any]:
        """Seconds; for the first version also the fingerprint of what is held then."""
        started = time.perf_counter()
        packed = transport.load(held)
        marks = [started, time.perf_counter()]
        self.receiver.install(packed)
        marks.append(time.perf_counter())
        if not first:
            return {"load_s": marks[1] - marks[0], "copy_s": marks[2] - marks[1]}
        stated = fingerprint(trainable.trained(self.module))
        marks.append(time.perf_counter())
        load, install_s, fingerprint_s = (b - a for a, b in pairwise(marks))
        return {"load_s": load, "install_s": install_s, "fingerprint_s": fingerprint_s, "stated": stated}

    def get(self, held: transport.Refs) -> float:
        started = time.perf_counter()
        ray.get(held)
        return time.perf_counter() - started


class Sides:
    """The actors of one size, and what is measured in turn: each side returns its seconds by name."""

    def __init__(self, mb: float) -> None:
        options = {"num_cpus": 0.1, "runtime_env": {"env_vars": thread_env(1)}}
        actors = [ray.remote(actor).options(**options).remote() for actor in (Publisher, Loader, Loader)]
        self.actors, (self.learner, self.sampler, self.seated) = actors, actors
        (self.nbytes, self.tensors), *_ = ray.get([actor.hold.remote(mb) for actor in actors])
        self.buckets: int = ray.get(self.learner.buckets.remote())
        address, port, _ = ray.get(self.learner.open_broadcasts.remote(0, TIMEOUT))
        ray.get(self.seated.sit.remote(address, port))

    def ours(self, step: int) -> dict[str, Any]:
        """Publish through the object store and load."""
        started = time.perf_counter()
        published = transport.publish([self.learner], [self.buckets], Version(0, step))
        [seconds] = ray.get(list(published.acks))
        wall = time.perf_counter() - started
        stated = published.fingerprint  # waits for the checksums: they must not run beside the load
        found: dict[str, Any] = ray.get(self.sampler.load.remote(published.weights, step == 0))
        if found.pop("stated", stated) != stated:
            raise RuntimeError("what was loaded is not what was published")
        return found | {"publish_s": seconds, "publish_wall_s": wall}

    def rays(self, step: int) -> dict[str, Any]:
        """Ray's own put and get of as many bytes."""
        started = time.perf_counter()
        seconds, held = ray.get(self.learner.put.remote())
        wall = time.perf_counter() - started
        return {"put_s": seconds, "put_wall_s": wall, "get_s": ray.get(self.sampler.get.remote(held))}

    def sent(self, step: int) -> dict[str, Any]:
        """Broadcast."""
        delivery: Delivery = ray.get(self.learner.broadcast.remote(Version(0, step), ["sampler"]))
        if delivery.error:
            raise RuntimeError(delivery.error)
        return {"broadcast_s": delivery.seconds}

    def warm(self, room: float) -> None:
        """Let the learner touch the store's memory: the first time costs a page fault per 4 kB."""
        held = [ray.get(self.learner.put.remote()) for _ in range(int(room * WARM / self.nbytes))]
        del held
        time.sleep(PAUSE)

    def first(self) -> dict[str, Any]:
        """One turn that does not count, in which a sampler's parameters are laid out as they come."""
        self.ours(0)
        found = self.ours(0) | self.rays(0) | self.sent(0)
        found["checksums_s"] = ray.get(self.learner.timed_checksums.remote())
        if ray.get(self.seated.holds.remote(Version(0, 0))) != combine(ray.get([self.learner.checksums.remote()])):
            raise RuntimeError("what was broadcast is not what the learner holds")
        return found

    def turn(self, step: int) -> dict[str, Any]:
        """All sides once, every other time in reverse."""
        found: dict[str, Any] = {}
        sides = (self.ours, self.rays, self.sent)
        for side in sides if step % 2 else reversed(sides):
            found |= side(step)
            time.sleep(PAUSE)
        return found

    def end(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


def row(mb: float, pairs: int, room: float) -> dict[str, Any]:
    """One size: `pairs` pairs in turn, after one that does not count. room: bytes of the store."""
    sides = Sides(mb)
    sides.warm(room)
    first, measured = sides.first(), [sides.turn(step) for step in range(1, pairs + 1)]
    sides.end()
    ratios = sorted((m["put_s"] + m["get_s"]) / (m["publish_s"] + m["load_s"]) for m in measured)
    walls = [(m["put_wall_s"] + m["get_s"]) / (m["publish_wall_s"] + m["load_s"]) for m in measured]
    gains = [(m["publish_s"] + m["load_s"] + m["copy_s"]) / m["broadcast_s"] for m in measured]
    names = ("publish_s", "load_s", "copy_s", "broadcast_s", "put_s", "get_s", "publish_wall_s", "put_wall_s")
    return {
        "mb": mb,
        "bytes": sides.nbytes,
        "tensors": sides.tensors,
        "objects": sides.buckets,
        **{name: round(statistics.median(m[name] for m in measured), 5) for name in names},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(r, 3) for r in ratios],
        "gain": round(statistics.median(gains), 3),
        "wall_ratio": round(statistics.median(walls), 3),
        **{name: round(first[name], 4) for name in ("install_s", "fingerprint_s", "checksums_s")},
        "load": round(os.getloadavg()[0], 1),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For people, in Markdown."""
    head = ["MB", "tensors", "objects", "publish", "load", "ray.put", "ray.get", "ratio", "copy", "broadcast", "gain"]
    head += ["install", "fingerprint"]
    lines = [head, ["---"] * len(head)]
    for r in rows:
        times = [f"{1000 * r[name]:.1f} ms" for name in ("publish_s", "load_s", "put_s", "get_s")]
        both = [f"{1000 * r[name]:.1f} ms" for name in ("copy_s", "broadcast_s")]
        after = [f"{1000 * r[name]:.0f} ms" for name in ("install_s", "fingerprint_s")]
        sizes = [f"{r['mb']:g}", str(r["tensors"]), str(r["objects"])]
        lines.append([*sizes, *times, f"{r['ratio']:.2f}", *both, f"{r['gain']:.2f}", *after])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def result(arguments: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, nargs="+", default=[10.0, 100.0, 1000.0], help="million bytes")
    parser.add_argument("--pairs", type=int, default=9)
    options = parser.parse_args(arguments)
    if min(options.mb) <= 0 or options.pairs < 1:
        raise ValueError(f"--mb and --pairs must be above 0, got {options.mb} and {options.pairs}")
    mine = not ray.is_initialized()
    room = max(200e6, STORE * max(options.mb) * 1e6)
    if mine:
        ray.init(
            address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=int(room)
        )
    try:
        rows = [row(mb, options.pairs, room) for mb in options.mb]
    finally:
        if mine:
            ray.shutdown()
    return {
        "command": shlex.join(["python", "-m", "benchmarks.weight_sync", *arguments]),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "pairs": options.pairs,
        "rows": rows,
    }


def main() -> None:
    found = result(sys.argv[1:])
    print(table(found["rows"]), file=sys.stderr)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
