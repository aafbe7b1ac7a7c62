"""Make the embedded domain's package data: `python -m benchmarks.make_shapes STAGE`.

Stages, in order: `prompts` (seconds), `vae` (about 10 CPU minutes), `decoder` (its decoder further, 10 CPU minutes),
`base` (encodes the scenes, then trains transformer and text model; about 130 CPU minutes), `looks` (decoder) and
`mixture` (base) on scenes of differing quality, `rewards` (65 CPU minutes), `preference`, `detector` (7 CPU minutes),
`card` (scores everything and writes the model card). `all` runs the ten, and goes on where it was stopped: after the
last stage that ended, `base` and `mixture` from their last saved step. Every stage has a fixed seed and runs on one
thread, so it can be repeated; intermediate fp32 weights and the facts that the card reports go to --work.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

ORDER = ("prompts", "vae", "decoder", "base", "looks", "mixture", "rewards", "preference", "detector", "card")
STAGES = {stage: stage for stage in ORDER} | {"prompts": "world"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.make_shapes", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, default=Path("runs/make_shapes"), help="logs and fp32 checkpoints")
    parser.add_argument("--steps", type=int, default=0, help="training steps; 0 = the recorded number")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; 1 repeats the committed run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    ended = {stage: args.work / f"{stage}.ended" for stage in STAGES}  # files that say with how many steps
    for stage in STAGES if args.stage == "all" else [args.stage]:
        if args.stage == "all" and ended[stage].exists() and ended[stage].read_text() == str(args.steps):
            print(f"{stage}: ended before; to make it again, remove {ended[stage]}", flush=True)
            continue
        for later in ORDER[ORDER.index(stage) :]:  # what is made from it is made again
            ended[later].unlink(missing_ok=True)
        importlib.import_module(f"{__package__}.{STAGES[stage]}").main(args)
        ended[stage].write_text(str(args.steps))
    if args.stage == "all":
        for file in ended.values():
            file.unlink()


if __name__ == "__main__":
    main()
