"""Run the whole campaign and write its figures: `make bad-input`."""

from __future__ import annotations

import json
import sys
from datetime import date

import torch
from transformers.utils import logging

from tests.badinput.campaign import DRAWN, MUTATED, in_a_new_folder
from tests.badinput.outcome import summary
from tests.badinput.section import section
from tests.marked import RELIABILITY, write
from tests.paths import ROOT

JSON = ROOT / "docs" / "data" / "bad_input.json"


def main() -> int:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found, seconds = in_a_new_folder()
    faults = [one for one in found if not one.good]
    figures = {
        "date": date.today().isoformat(),
        "mutated": MUTATED,
        "drawn": DRAWN,
        "seconds": round(seconds),
        "kinds": summary(found),
        "faults": [{"kind": f.kind, "name": f.name, "verdict": f.verdict, "message": f.message[:300]} for f in faults],
    }
    JSON.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write(RELIABILITY, "bad input", section(figures))
    print(section(figures))
    for fault in faults:
        print(f"{fault.verdict}: {fault.kind}, {fault.name}: {fault.message[:200]}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
