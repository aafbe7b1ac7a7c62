"""Soak and write the figures: `make soak`, which is `python -m tests.soak --minutes 10`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from tests.reliability import publish
from tests.soak.campaign import Record, Sample, in_a_new_folder
from tests.soak.processes import Process
from tests.soak.raylet import Store
from tests.soak.run import Kill
from tests.soak.section import section
from tests.soak.verdicts import figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="After the first step.")
    parser.add_argument("--seed", type=int, default=17, help="Of the kills.")
    parser.add_argument("--samples", type=Path, help="Also write all samples to this file, a line of JSON each.")
    parser.add_argument("--name", default="soak", help="Of the section, and of docs/data/NAME.json.")
    parser.add_argument("--dry", action="store_true", help="Write nothing into docs/.")
    parser.add_argument("--again", type=Path, help="Soak nothing: the figures of samples that were written.")
    asked = parser.parse_args()
    if asked.again:
        record = read_samples(asked.again)
    else:
        record = in_a_new_folder(asked.minutes, asked.seed, say=lambda line: print(line, file=sys.stderr, flush=True))
    if asked.samples:
        write_samples(asked.samples, record)
    found = {"name": asked.name, "date": date.today().isoformat(), "seed": asked.seed, **figures(record)}
    if not asked.dry:
        publish(asked.name, found, section(found))
    print(section(found))
    for fault in found["faults"]:
        print(f"fault: {fault}", file=sys.stderr)
    return 1 if found["faults"] else 0


def write_samples(file: Path, record: Record) -> None:
    """One line for each sample, with what each process had; then one for each kill, and one for the rest."""
    with file.open("w") as lines:
        for sample in record.samples:
            plain = asdict(sample)
            for process in plain["processes"]:
                process["sockets"] = len(process.pop("inodes"))
                process["shared"] = sum(process["shared"].values())
            print(json.dumps(plain), file=lines)
        for kill in record.kills:
            print(json.dumps({"kill": asdict(kill)}), file=lines)
        print(json.dumps({"ran": record.seconds, "faults": record.faults}), file=lines)


def read_samples(file: Path) -> Record:
    """What `write_samples` wrote. A process has as many sockets, and as much shared memory, in a file of its own."""
    record = Record()
    for line in map(json.loads, file.read_text().splitlines()):
        if "kill" in line:
            record.kills.append(Kill(**line["kill"]))
        elif "ran" in line:
            record.seconds, record.faults = line["ran"], line["faults"]
        else:
            processes = [_process(plain) for plain in line.pop("processes")]
            store = line.pop("store")
            held = store and Store(**store | {"references": {int(k): v for k, v in store["references"].items()}})
            record.samples.append(Sample(processes=processes, store=held, **line))
    return record


def _process(plain: dict[str, Any]) -> Process:
    inodes, shared = frozenset(map(str, range(plain.pop("sockets")))), plain.pop("shared")
    return Process(**plain, inodes=inodes, shared={(0, plain["pid"]): shared})


if __name__ == "__main__":
    sys.exit(main())
