"""python -m benchmarks.memory: the peak memory of a learner's backward, one node at a time against the K-graph.

--meter saved (where the device is a CPU): bytes of the storages that autograd holds (saved-tensor hooks), parameters
included once; they do not depend on the machine. --meter allocated (where it is a GPU): everything allocated,
parameters, gradients (allocated beforehand) and temporaries included, optimizer excluded; on CUDA it is
`torch.cuda.max_memory_allocated`. The K-graph holds decoder and reward (not at sd3-14m, which has none); the sweep's
cotangent comes from elsewhere. null is where memory did not suffice. Prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.meters import SavedBytes, attempt, peak_bytes, tidy
from benchmarks.models import Models
from benchmarks.options import Cell, cells, described, models, parser
from benchmarks.problem import by_graph, by_sweep, problem
from flowbp_ray.utils.console import guarded

COUNTS = (1, 2, 4, 8)


def measured(m: Models, cell: Cell, meter: str) -> dict[str, Any]:
    """MiB of both sides; the ratio is K-graph / sweep."""
    m.checkpointing(cell.checkpointing)
    p = problem(m, cell.rows, cell.k, cell.method)

    def peak(work: Callable[[], None], scoring: bool) -> float | None:
        def run() -> int:
            m.hold_scoring(scoring)
            if meter == "saved":
                return SavedBytes().measure(work)
            p.hold_gradients()
            return peak_bytes(work, m.device, [m.transformer, *(m.scoring.modules if scoring and m.scoring else ())])

        p.forget()
        found = attempt(run, m.device)
        p.forget()
        return None if found is None else round(found / 2**20, 2)

    sweep, graph = peak(lambda: by_sweep(p), False), peak(lambda: by_graph(p), True)
    ratio = round(graph / sweep, 2) if sweep and graph else None
    return cell.names() | {"sweep_mib": sweep, "k_graph_mib": graph, "ratio": ratio}


def over_k(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How both sides grow from K = 1 to 8, where exactly one setting was measured at both and fits."""
    at = {row["k"]: row for row in rows}
    if len(at) < len(rows) or not {1, 8} <= at.keys() or at[8]["ratio"] is None:
        return {}
    return {
        "sweep_8_over_sweep_1": round(at[8]["sweep_mib"] / at[1]["sweep_mib"], 4),
        "k_graph_8_over_sweep_8": at[8]["ratio"],
    }


def result(arguments: Sequence[str]) -> dict[str, Any]:
    """What the command prints."""
    made = parser(__doc__, k=COUNTS, methods=["flowbp_sparse"])
    made.add_argument("--meter", choices=("saved", "allocated"), help="default: saved on cpu, allocated on cuda")
    options = made.parse_args(arguments)
    m = models(options)
    meter = options.meter or ("allocated" if m.device.type == "cuda" else "saved")
    rows = []
    for cell in cells(options):
        rows.append(measured(m, cell, meter))
        tidy(m.device)
    return described(m, options, "benchmarks.memory", arguments) | {"meter": meter, "rows": rows} | over_k(rows)


def main() -> None:
    print(json.dumps(result(sys.argv[1:]), indent=1))


if __name__ == "__main__":
    guarded(main)
