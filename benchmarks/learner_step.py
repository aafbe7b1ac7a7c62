"""python -m benchmarks.learner_step: time of a learner's backward, one node at a time against the K-graph.

Both give the same parameter gradient (compared first; exit code 1 where they differ by over 1e-5 in fp32). The K-graph
must know the guided velocity's value, so with a negative branch it runs that too, without gradient; the sweep needs
no value, so it does not. The K-graph also decodes and scores (not at sd3-14m), and goes back through both. Seconds are
CPU time of this process, on CUDA time between events; a is the sweep, b the K-graph, null where memory did not suffice.
--parity: also the gradients in bf16 against fp32, from the same weights and states. Prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.meters import alone, attempt, compare, gradients, paired, seconds, tidy
from benchmarks.models import Models
from benchmarks.options import Cell, cells, described, models, parser
from benchmarks.parity import parity
from benchmarks.problem import Problem, by_graph, by_sweep, problem
from flowbp_ray.utils.console import guarded

PAIRS = 9
LIMIT = 1e-5  # of sweep against K-graph in fp32, relative


def timed(m: Models, cell: Cell, pairs: int) -> dict[str, Any]:
    """Seconds of both sides, after a run of each whose gradients are compared."""
    m.checkpointing(cell.checkpointing)
    p = problem(m, cell.rows, cell.k, cell.method)

    def clock(work: Callable[[Problem], None], scoring: bool) -> Callable[[], float]:
        def run() -> float:
            p.forget()
            m.hold_scoring(scoring)
            return seconds(lambda: work(p), m.device)

        return run

    sweeping, graphing = clock(by_sweep, False), clock(by_graph, True)
    difference = None
    one = attempt(sweeping, m.device)
    reference = gradients(m.transformer)
    both = attempt(graphing, m.device)
    if one is not None and both is not None:
        difference = compare(m.transformer, reference)["relative_l2"]
        found = paired(sweeping, graphing, pairs)
    else:
        found = {
            "pairs": pairs,
            "a_s": alone(None if one is None else sweeping, pairs),
            "b_s": alone(None if both is None else graphing, pairs),
            "ratio": None,
        }
    p.forget()
    return cell.names() | found | {"relative_difference_of_gradients": difference}


def result(arguments: Sequence[str]) -> dict[str, Any]:
    """What the command prints."""
    made = parser(__doc__, k=[4], methods=["flowbp_sparse", "flowbp_bridge"])
    made.add_argument("--pairs", type=int, default=PAIRS)
    made.add_argument("--parity", action="store_true", help="also bf16 against fp32, at the first of each option")
    options = made.parse_args(arguments)
    if options.pairs < 1:
        raise ValueError(f"--pairs must be at least 1, got {options.pairs}")
    m = models(options)
    rows = []
    for cell in cells(options):
        rows.append(timed(m, cell, options.pairs))
        tidy(m.device)
    found = described(m, options, "benchmarks.learner_step", arguments) | {"k": options.k[0], "rows": rows}
    found |= {row["method"]: row for row in reversed(rows)}  # by name: each method's first setting
    return found | ({"parity": parity(m, next(cells(options)))} if options.parity else {})


def apart(found: dict[str, Any]) -> list[float]:
    """The differences of the two gradients in fp32 that are above LIMIT."""
    differences = [row["relative_difference_of_gradients"] for row in found["rows"] if found["dtype"] == "float32"]
    differences += [side["relative_l2"] for side in [found.get("parity", {}).get("k_graph_fp32")] if side]
    return [d for d in differences if d is not None and not d <= LIMIT]


def main() -> None:
    found = result(sys.argv[1:])
    print(json.dumps(found, indent=1))
    if apart(found):
        sys.exit(f"learner_step: sweep and K-graph differ by {max(apart(found))} in fp32, more than {LIMIT}")


if __name__ == "__main__":
    guarded(main)
