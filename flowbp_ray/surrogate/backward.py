"""The gradient of a surrogate (FlowBP, arXiv 2606.11075): `endpoint` defines it, `sweep` computes it.

`endpoint` builds one autograd graph of all forwards; `sweep` accumulates the same gradient one forward at a time.
A velocity is a callable v(x [R, …], node [R] int64, row [R] int64) -> [R, …]; `row` is the sample of the batch that a
state belongs to, for its conditioning. `plans` holds one Plan per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import Cache, groups, state_value, target_value
from .plan import Branch, Plan, Renoised, Segment, Term
from .trajectory import Velocity

Backward = Callable[[Tensor, bool], None]


@dataclass(frozen=True)
class SweepReport:
    """Counts of one sweep: forwards, rows in all forwards, and rows of these that were padding."""

    forwards: int
    rows: int
    padding: int

    def __add__(self, other: SweepReport) -> SweepReport:
        return SweepReport(self.forwards + other.forwards, self.rows + other.rows, self.padding + other.padding)


# ---------------------------------------------------------------------------------------------------- the definition


def endpoint(velocity: Velocity, plans: Sequence[Plan], cache: Cache) -> Tensor:
    """Compute the surrogate's targets WITH gradient: [B, branches, …], equal to `gather_targets(plans, cache)`.

    Straight-through y + stopgrad(cached − y) at the junction and at the end. Every active node is evaluated again at
    its cached state, the junction at alpha·y + (1−alpha)·stopgrad(y). Autograd holds all these forwards at once.
    """
    out: list[Tensor] = [torch.empty(0)] * len(plans)
    for plan, rows in groups(plans, cache.x.device):
        values = torch.stack([_branch_endpoint(velocity, cache, branch, rows) for branch in plan.branches], dim=1)
        for value, b in zip(values, rows.tolist(), strict=True):
            out[b] = value
    return torch.stack(out)


def _branch_endpoint(velocity: Velocity, cache: Cache, branch: Branch, rows: Tensor) -> Tensor:
    fresh = branch.target.index if isinstance(branch.target, Renoised) else None
    known: dict[int, Tensor] = {}

    def evaluate(node: int, x: Tensor | None = None) -> Tensor:
        if node not in known:
            at = state_value(cache, node, fresh, rows) if x is None else x
            index = torch.full_like(rows, node)
            known[node] = velocity(at.to(cache.x.dtype), index, rows).to(cache.compute_dtype)
        return known[node]

    def integrate(start: Tensor, segment: Segment, end: Tensor) -> Tensor:
        y = start
        for node, c in segment.coefficients.items():
            y = y + c * evaluate(node)
        return y + (end - y).detach()

    last = branch.segments[-1]
    y = state_value(cache, last.start, fresh, rows)
    if len(branch.segments) == 2:
        first = branch.segments[0]
        y = integrate(state_value(cache, first.start, fresh, rows), first, y)
        if branch.junction is not None:
            evaluate(last.start, branch.coupling * y + (1.0 - branch.coupling) * y.detach())
    return integrate(y, last, target_value(cache, branch.target, rows))


# ------------------------------------------------------------------------------------------------- one node at a time


def _backward(loss: Tensor, last: bool) -> None:
    loss.backward()


def sweep(
    velocity: Velocity,
    plans: Sequence[Plan],
    states: Tensor,
    cotangents: Tensor,
    *,
    micro_batch: int | None = None,
    fuse: int = 1,
    backward: Backward = _backward,
    terms_per_sample: int | None = None,
    observe: Callable[[Tensor, Tensor], None] | None = None,
    penalty: Callable[[Tensor, Tensor], Tensor] | None = None,
    closes: bool = True,
) -> SweepReport:
    """Accumulate the parameter gradient of Σ_b ⟨u[b], target[b]⟩, holding the activations of one forward at a time.

    With c = weight·gain, per active node:  last segment VJP_θ(v, c·u); junction also u' = u + alpha·VJP_x(v, c·u);
    first segment VJP_θ(v, c·u').

    states: [R, …], sample-major, in the order of `gather_states`. cotangents: u [B, branches, …], fp32 (or fp64).
    micro_batch: samples per group (default all); a forward has at most micro_batch·fuse rows, except that a junction's
        forward has all junction rows of the group.
    backward(loss, last): must add the gradient of the scalar `loss`, unscaled; `last` marks the final call. closes:
        whether there is one here; False if more gradient is added afterwards.
    terms_per_sample: pad every sample with zero-cotangent rows to this many VJPs besides the junction's (see
        `Method.max_terms`), so that all ranks run the same number of forwards.
    observe(position [r], v [r, …]): receives each forward's velocities, detached and without padding; `position`
        indexes `states`, and is on the host.
    penalty(position [r], v [r, …]) -> [r, …]: the gradient in v of a further loss on the velocities at the fixed
        states; `position` as above. Each state is passed once, and the result is added to its row's cotangent, so this
        takes no further forward or backward. A junction's gradient at x belongs to the reward alone, so a state that
        only a junction evaluates gets a second row in that forward.
    """
    work = _Work(plans, states, cotangents, micro_batch or len(plans), fuse, terms_per_sample, penalty)
    forwards = rows = padding = 0
    calls = list(work.calls())
    for number, call in enumerate(calls):
        last = closes and number == len(calls) - 1
        work.run(velocity, call, backward, last, observe)
        forwards, rows, padding = forwards + 1, rows + len(call.rows), padding + call.padding
    return SweepReport(forwards, rows, padding)


@dataclass(frozen=True)
class _Row:
    """One row of a forward: a sample at a term's state. reward, penalty: which cotangents it carries; padding: none."""

    sample: int
    term: Term
    reward: bool = True
    penalty: bool = False


@dataclass(frozen=True)
class _Call:
    """The rows of one forward. For a junction call the gradient at x is kept too."""

    rows: tuple[_Row, ...]
    junction: bool

    @property
    def padding(self) -> int:
        return sum(not (row.reward or row.penalty) for row in self.rows)


class _Work:
    """The forwards of a sweep, and the nested gradients alpha·VJP_x that later ones need."""

    def __init__(
        self,
        plans: Sequence[Plan],
        states: Tensor,
        u: Tensor,
        micro_batch: int,
        fuse: int,
        slots: int | None,
        penalty: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> None:
        self.plans, self.states, self.u, self.penalty = plans, states, u, penalty
        self.micro_batch, self.fuse, self.slots = micro_batch, fuse, slots
        self.terms = [plan.terms() for plan in plans]
        counts = [len(plan.states) for plan in plans]
        self.offset = [sum(counts[:b]) for b in range(len(plans))]
        self.nested: dict[tuple[int, int], Tensor] = {}
        if micro_batch < 1 or fuse < 1:
            raise ValueError(f"micro_batch and fuse must be at least 1, got {micro_batch} and {fuse}")
        if len(states) != sum(counts):
            raise ValueError(f"states must be the {sum(counts)} rows that gather_states gives, got {len(states)}")
        if u.shape[:2] != (len(plans), len(plans[0].branches)):
            raise ValueError(
                f"cotangents must be [{len(plans)}, {len(plans[0].branches)}, …] (samples, branches), "
                f"got {list(u.shape)}"
            )

    def calls(self) -> Iterator[_Call]:
        """Yield, per group of micro_batch samples, a call with its junction rows, then calls with the other rows.

        The other rows are ordered by slot: the first of each sample, then the second of each, and so on.
        """
        for first in range(0, len(self.plans), self.micro_batch):
            group = range(first, min(first + self.micro_batch, len(self.plans)))
            joint = [row for b in group for row in self._joint(b)]
            if joint:
                yield _Call(tuple(joint), True)
            columns = [self._column(b) for b in group]
            most = max(len(column) for column in columns)
            rows = [column[slot] for slot in range(most) for column in columns if slot < len(column)]
            size = len(group) * self.fuse
            for i in range(0, len(rows), size):
                yield _Call(tuple(rows[i : i + size]), False)

    def _joint(self, b: int) -> list[_Row]:
        """The junction rows of sample b; with a penalty, one more row per state that only a junction evaluates."""
        rows = [_Row(b, term) for term in self.terms[b] if term.is_junction]
        if self.penalty is None:
            return rows
        elsewhere = {term.state for term in self.terms[b] if not term.is_junction}
        owed = {row.term.state: row.term for row in rows if row.term.state not in elsewhere}
        return rows + [_Row(b, term, reward=False, penalty=True) for term in owed.values()]

    def _column(self, b: int) -> list[_Row]:
        """The rows of sample b without its junctions', padded to `slots`; a state's first row carries its penalty."""
        rows, seen = [], set()
        for term in self.terms[b]:
            if not term.is_junction:
                rows.append(_Row(b, term, penalty=self.penalty is not None and term.state not in seen))
                seen.add(term.state)
        if self.slots is None:
            return rows
        if len(rows) > self.slots:
            raise ValueError(
                f"terms_per_sample must be at least {len(rows)} for the plan of sample {b}, got {self.slots}"
            )
        return rows + [_Row(b, self.terms[b][0], reward=False)] * (self.slots - len(rows))

    def run(
        self,
        velocity: Velocity,
        call: _Call,
        backward: Backward,
        last: bool,
        observe: Callable[[Tensor, Tensor], None] | None,
    ) -> None:
        """Run one forward and one backward; keep alpha·VJP_x of a junction."""
        places = [self.offset[row.sample] + row.term.state for row in call.rows]
        x = self.states[self._there(places)].detach().requires_grad_(call.junction)
        node = self._there([row.term.node for row in call.rows])
        sample = self._there([row.sample for row in call.rows])
        cotangent = torch.stack([self._cotangent(row) for row in call.rows])
        v = velocity(x, node, sample)
        if observe is not None:
            real = [i for i, row in enumerate(call.rows) if row.reward]
            observe(_indices([places[i] for i in real]), v.detach()[self._there(real)])
        due = [i for i, row in enumerate(call.rows) if row.penalty]
        if self.penalty is not None and due:
            at = self._there(due)
            cotangent[at] += self.penalty(_indices([places[i] for i in due]), v.detach()[at])
        backward((v.to(cotangent.dtype) * cotangent).sum(), last)
        if call.junction:
            assert x.grad is not None
            for row, grad in zip(call.rows, x.grad.to(cotangent.dtype), strict=True):
                if row.reward:
                    self.nested[row.sample, row.term.branch] = row.term.alpha * grad

    def _there(self, values: Sequence[int]) -> Tensor:
        """The integers on the states' device. A GPU is not waited for, as it would be by `torch.tensor(device=...)`."""
        return _indices(values).to(self.states.device, non_blocking=True)

    def _cotangent(self, row: _Row) -> Tensor:
        """The reward's cotangent of a row, c_last·u + c_first·u', at least fp32."""
        u = self.u[row.sample, row.term.branch]
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        if not row.reward:
            return torch.zeros_like(u)
        nested = self.nested.get((row.sample, row.term.branch))
        total = (row.term.c_last + row.term.c_first) * u
        return total if nested is None or row.term.is_junction else total + row.term.c_first * nested


def _indices(values: Sequence[int]) -> Tensor:
    """[n] int64 on the host, for no values too."""
    return torch.tensor(values, dtype=torch.int64)
