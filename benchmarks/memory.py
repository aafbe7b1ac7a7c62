"""python -m benchmarks.memory: peak bytes saved for backward at K = 1, 2, 4, 8, one node at a time against the K-graph.

Bytes are those of the storages that autograd holds (saved-tensor hooks), parameters included once; they do not depend
on the machine. Prints JSON.
"""

from __future__ import annotations

import json

import torch

from benchmarks.models import Problem, SavedBytes, problem
from flowbp_ray.surrogate import endpoint, sweep

COUNTS = (1, 2, 4, 8)


def by_sweep(p: Problem) -> None:
    sweep(p.conditional, p.plans, p.states, p.cotangents)


def by_graph(p: Problem) -> None:
    (endpoint(p.guided, p.plans, p.cache) * p.cotangents).sum().backward()


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for k in COUNTS:
        p = problem(k)
        one_node, graph = SavedBytes().measure(lambda p=p: by_sweep(p)), SavedBytes().measure(lambda p=p: by_graph(p))
        rows.append({"k": k, "sweep_mib": round(one_node / 2**20, 2), "k_graph_mib": round(graph / 2**20, 2)})
    first, last = rows[0], rows[-1]
    result = {
        "model": "SD3-like, 14 M, 64 + 32 tokens, 2 rows, guidance 4.5",
        "rows": rows,
        "sweep_8_over_sweep_1": round(last["sweep_mib"] / first["sweep_mib"], 4),
        "k_graph_8_over_sweep_8": round(last["k_graph_mib"] / last["sweep_mib"], 2),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
