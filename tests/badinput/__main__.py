"""Run the whole campaign and write its figures: `make bad-input`."""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path

import torch
from transformers.utils import logging

from tests.badinput.campaign import DRAWN, MUTATED, in_a_new_folder
from tests.badinput.outcome import summary
from tests.badinput.section import section
from tests.paths import ROOT

JSON = ROOT / "docs" / "data" / "bad_input.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- bad input -->", "<!-- /bad input -->"


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
    write(PAGE, section(figures))
    print(section(figures))
    for fault in faults:
        print(f"{fault.verdict}: {fault.kind}, {fault.name}: {fault.message[:200]}", file=sys.stderr)
    return 1 if faults else 0


def write(page: Path, text: str) -> None:
    """Put the section between its marks; where there are none, at the end of the page."""
    whole = page.read_text(encoding="utf-8") if page.is_file() else "# Reliability\n"
    marked = f"{BEGIN}\n{text}{END}\n"
    before, begin, rest = whole.partition(f"{BEGIN}\n")
    page.write_text(
        before + marked + rest.partition(f"{END}\n")[2] if begin else f"{whole}\n{marked}", encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main())
