"""How long a save keeps a rank waiting: written at once, and by threads from a copy, in pairs on the same disk.

    python -m benchmarks.save_pause --gigabytes 1 --pairs 5 --out pause.json

One rank of plain torch with AdamW's state, and the driver's part of the checkpoint, in one process without Ray: each
save writes both, fsynced, with digests and manifest. While threads write, the process computes (a product of matrices
at a time), so what the writing costs the steps is measured too. `--readme` prints the section of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowbp_ray.config.learners import LearnersConfig
from flowbp_ray.learning.engine import TorchEngine
from flowbp_ray.learning.saver import StateSaver
from flowbp_ray.run.checkpoint import Checkpoints, Snapshot
from flowbp_ray.run.engine_state import bytes_of

WIDTH = 2048
WORK = 768  # side of the matrices that are multiplied meanwhile


def made(gigabytes: float) -> TorchEngine:
    """An engine whose state takes so many GB: fp32 weights, which are their own masters, and two moments."""
    layers = max(1, round(gigabytes * 1e9 / (12 * WIDTH * WIDTH)))
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    engine = TorchEngine(module, LearnersConfig(micro_batch=1, engine="torch"))
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    engine.step(1e-3)
    return engine


def compute(side: Tensor) -> float:
    """Seconds of a piece of work."""
    began = time.perf_counter()
    _ = side @ side
    return time.perf_counter() - began


def save(
    engine: TorchEngine, checkpoints: Checkpoints, step: int, weights: dict[str, Tensor], background: bool
) -> dict[str, float]:
    """Save once. pause_s: in which the loop waits; written_s: until the checkpoint has its name; work_s: of a piece."""
    checkpoints.settle()
    saver, side, pieces = StateSaver(engine, 1), torch.randn(WORK, WORK), list[float]()
    began = time.perf_counter()
    saver.begin(checkpoints.begin(step), background)
    ours = checkpoints.write(Snapshot(step, weights, {}, {}))
    if not background:
        ours.result()
    pause = time.perf_counter() - began
    while not ours.done() or saver.saved(wait=False) is None:
        pieces.append(compute(side))
    ending = time.perf_counter()
    written = saver.saved(wait=True)
    assert written is not None
    checkpoints.commit(step, 1, None, written | ours.result())
    ended = time.perf_counter()
    alone = [compute(side) for _ in range(120)][20:] if not background else pieces  # the first ones are slower
    return {"pause_s": pause + ended - ending, "written_s": ended - began, "work_s": statistics.median(alone or [0.0])}


def copy_seconds(engine: TorchEngine) -> float:
    """Seconds of copying the state, and nothing else."""
    own = engine.fragments()
    began = time.perf_counter()
    _ = [tensor.clone() for fragment in own for tensor in fragment.tensors.values()]
    return time.perf_counter() - began


def measure(gigabytes: float, pairs: int, folder: Path) -> dict[str, Any]:
    """All saves, alternating which of a pair is first, after one of each that is not counted."""
    engine, checkpoints = made(gigabytes), Checkpoints(folder)
    weights = {name: tensor.bfloat16() for name, tensor in engine.weights().items()}
    found: dict[str, list[dict[str, float]]] = {"at once": [], "beside": []}
    step = 0
    for pair in range(pairs + 1):
        for background in (pair % 2 == 1, pair % 2 == 0):
            step += 1
            done = save(engine, checkpoints, step, weights, background)
            if pair:
                found["beside" if background else "at once"].append(done)
    copies = [copy_seconds(engine) for _ in range(pairs)]
    checkpoints.settle()
    assert checkpoints.damages(step) == []
    state, published = bytes_of(engine.fragments()), sum(t.nbytes for t in weights.values())
    return {"state_bytes": state, "weight_bytes": published, "pairs": pairs, "copy_s": copies, "saves": found}


def middle(saves: Sequence[dict[str, float]], key: str) -> str:
    """Median and range."""
    values = [one[key] for one in saves]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def section(figures: dict[str, Any]) -> str:
    """The section of docs/reliability.md. Figures may have a `note` on the machine."""
    note = f" {figures['note']}" if figures.get("note") else ""
    at_once, beside = figures["saves"]["at once"], figures["saves"]["beside"]
    copies = statistics.median(figures["copy_s"])
    slower = statistics.median(s["work_s"] for s in beside) / statistics.median(s["work_s"] for s in at_once)
    ratio = statistics.median(s["pause_s"] for s in at_once) / statistics.median(s["pause_s"] for s in beside)
    waits = statistics.median(s["pause_s"] for s in beside)
    return "\n".join(
        [
            "## What a save costs",
            f"A rank's state of {figures['state_bytes'] / 1e9:.2f} GB and {figures['weight_bytes'] / 1e9:.2f} GB of",
            "published weights, written with digests, fsync and a manifest; seconds as median (range) of",
            f"{figures['pairs']} pairs, by `python -m benchmarks.save_pause`{note}:",
            "",
            "| | the loop waits | until the checkpoint has its name |",
            "| --- | --- | --- |",
            f"| written at once | {middle(at_once, 'pause_s')} | {middle(at_once, 'written_s')} |",
            f"| copied, written beside the steps | {middle(beside, 'pause_s')} | {middle(beside, 'written_s')} |",
            "",
            f"The pause is {ratio:.1f} times shorter, and {waits / copies:.2f} times that of the copy alone "
            f"({copies:.2f} s).",
            f"While threads write, a product of matrices on one thread takes {slower:.2f} times as long.",
            "`checkpoint.background=false` waits as before.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--readme", type=Path, help="a JSON file of before, whose section is printed")
    parser.add_argument("--note", default="", help="what else the machine did, for the section")
    args = parser.parse_args()
    if args.readme:
        print(section(json.loads(args.readme.read_text())))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args.gigabytes, args.pairs, Path(folder))
    figures["note"] = args.note
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(section(figures))


if __name__ == "__main__":
    main()
