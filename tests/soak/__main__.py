"""Soak and write the figures: `make soak`, which is `python -m tests.soak --minutes 10`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path

from tests.reliability import publish
from tests.soak.campaign import Record, in_a_new_folder
from tests.soak.section import section
from tests.soak.verdicts import figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="After the first step.")
    parser.add_argument("--seed", type=int, default=17, help="Of the kills.")
    parser.add_argument("--samples", type=Path, help="Also write all samples to this file, a line of JSON each.")
    parser.add_argument("--name", default="soak", help="Of the section, and of docs/data/NAME.json.")
    parser.add_argument("--dry", action="store_true", help="Write nothing into docs/.")
    asked = parser.parse_args()
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
    """One line for each sample, with what each process had; then one for each kill."""
    with file.open("w") as lines:
        for sample in record.samples:
            plain = asdict(sample)
            for process in plain["processes"]:
                process["sockets"] = len(process.pop("inodes"))
                process["shared"] = sum(process["shared"].values())
            print(json.dumps(plain), file=lines)
        for kill in record.kills:
            print(json.dumps({"kill": asdict(kill)}), file=lines)


if __name__ == "__main__":
    sys.exit(main())
