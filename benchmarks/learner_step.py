"""python -m benchmarks.learner_step: CPU time of a learner's backward, one node at a time against the K-graph.

Both give the same parameter gradient (checked first). The K-graph must know the guided velocity's value, so it also
runs the negative branch, without gradient; the sweep needs no value, so it does not. Prints JSON.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from benchmarks.memory import by_graph, by_sweep
from benchmarks.models import Problem, problem
from benchmarks.paired import cpu_seconds, paired

PAIRS = 9
K = 4


def gradient(p: Problem) -> Tensor:
    found = torch.cat([q.grad.flatten() for q in p.model.parameters() if q.grad is not None])
    p.model.zero_grad(set_to_none=True)
    return found


def main() -> None:
    torch.set_num_threads(1)
    result: dict[str, object] = {"model": "SD3-like, 14 M, 64 + 32 tokens, 2 rows, guidance 4.5", "k": K}
    for method in ("flowbp_sparse", "flowbp_bridge"):
        p = problem(K, method=method)

        def sweeping(p: Problem = p) -> float:
            return cpu_seconds(lambda: by_sweep(p))

        def graphing(p: Problem = p) -> float:
            return cpu_seconds(lambda: by_graph(p))

        sweeping()
        one = gradient(p)
        graphing()
        both = gradient(p)
        error = float((one - both).norm() / both.norm())
        assert error < 1e-5, error
        result[method] = paired(sweeping, graphing, PAIRS) | {"relative_difference_of_gradients": error}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
