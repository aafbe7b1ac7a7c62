"""Run the campaign and write its figures: `make chaos`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from dataclasses import asdict
from datetime import date
from typing import Any

from tests.chaos.campaign import MISSED, Campaign, Record, faults, folder
from tests.chaos.faults import KINDS, Kind
from tests.chaos.planner import plans
from tests.chaos.section import section
from tests.reliability import FIGURES, publish

JSON = FIGURES / "chaos.json"


def main() -> int:
    given = arguments()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where the first one is ignored, as in a shell's background
        signal.signal(number, signal.default_int_handler)
    kinds = [kind for kind in KINDS if not given.only or any(part in kind.name for part in given.only)]
    if not kinds:
        print("no such fault; there are:", *(kind.name for kind in KINDS), sep="\n  ", file=sys.stderr)
        return 2
    whole = not given.only and given.faults is None
    figures = json.loads(JSON.read_text(encoding="utf-8")) if given.section or given.again else measured(kinds, given)
    if given.again:
        again = measured(kinds, given)
        kept = [record for record in figures["records"] if record["run"] not in given.again]
        figures |= {"records": sorted([*kept, *again["records"]], key=lambda record: record["run"])}
        figures |= {"again": sorted({*figures.get("again", []), *given.again})}
    if whole:
        publish("chaos", figures, section(figures))
    print(section(figures))
    records = [Record(**record) for record in figures["records"]]
    never = {kind.name for kind in kinds if not kind.impossible()} - {r.kind for r in records if r.injected}
    if whole and never:
        print(f"never injected: {', '.join(sorted(never))}", file=sys.stderr)
    return 1 if faults(records) or (whole and never) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="faults whose name has this in it")
    parser.add_argument("--faults", type=int, help="so many, of all kinds alike; the page is not written")
    parser.add_argument("--seed", type=int, default=17, help="of what is injected when")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no further run is begun")
    parser.add_argument("--at-once", type=int, default=2, help="runs beside each other")
    parser.add_argument("--again", nargs="+", type=int, default=[], metavar="RUN", help="these; the others are kept")
    parser.add_argument("--section", action="store_true", help="write the page from the figures that are there")
    return parser.parse_args()


def measured(kinds: list[Kind], given: argparse.Namespace) -> dict[str, Any]:
    """Run the campaign in a folder that is removed afterwards; return its figures."""
    began = time.monotonic()
    possible = [kind for kind in kinds if not kind.impossible()]
    for kind in kinds:
        if kind not in possible:
            print(f"not tried: {kind.name}: {kind.impossible()}", flush=True)
    planned = [p for p in plans(possible, given.seed, given.faults) if not given.again or p.number in given.again]

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)

    say(f"{sum(len(plan.faults) for plan in planned)} faults in {len(planned)} runs")
    with folder() as work:
        campaign = Campaign(work, given.seed, say)
        try:
            records = campaign.run(planned, given.at_once, began + 60 * given.minutes)
        finally:
            campaign.bury()
    for record in records:
        if record.outcome.startswith(MISSED):
            print(f"{record.kind}, run {record.run}: {record.outcome}", flush=True)
    return {
        "date": date.today().isoformat(),
        "seed": given.seed,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "at_once": given.at_once,
        "runs": len(campaign.running),
        "starts": sum(running.starts for running in campaign.running),
        "records": [asdict(record) for record in records],
    }


if __name__ == "__main__":
    sys.exit(main())
