"""make demo: train the embedded model by reward backpropagation over Ray, and say honestly what came of it.

Exit code 1 if the verifier's pass rate did not rise beyond its 95 % interval on held-out prompts.
"""

from __future__ import annotations

import sys

from flowbp_ray.artifacts.html_report import write_report
from flowbp_ray.artifacts.report import print_summary
from flowbp_ray.cli import console
from flowbp_ray.config import loading
from flowbp_ray.driver import train
from flowbp_ray.observability.progress import Progress
from flowbp_ray.utils.console import guarded


def main() -> None:
    config = loading.load("shapes_demo", sys.argv[1:])
    run, summary = train(config, Progress(config.steps, console=console))
    print_summary(console, run.folder, summary)
    page = write_report(run.folder)
    plain, guided = (summary["guidance"][f"{g:g}"] for g in (1.0, 3.0))
    change, tuned = plain["change"]["verifier"], plain["after"]["verifier"]["mean"]
    console.print(
        f"the verifier accepts {100 * change['mean']:+.1f} points more "
        f"(95 % interval {100 * change['low']:+.1f} to {100 * change['high']:+.1f}), without guidance"
    )
    base_guided, tuned_guided = (guided[when]["verifier"]["mean"] for when in ("before", "after"))
    better = "above" if base_guided > tuned else "below"
    console.print(
        f"for comparison, guidance 3 alone takes the base to {100 * base_guided:.1f} %, {better} "
        f"the tuned model without it ({100 * tuned:.1f} %); tuned and guided: {100 * tuned_guided:.1f} %"
    )
    console.print(f"all of it on one page, before and after with a slider: {page.path} (open it in a browser)")
    if change["low"] <= 0:
        print("demo: nothing improved beyond its interval", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    guarded(main)
