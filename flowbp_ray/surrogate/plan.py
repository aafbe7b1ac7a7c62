"""The plan of a surrogate trajectory: numbers that say where the reward's gradient flows (FlowBP, arXiv 2606.11075).

Node 0 is noise, node N the finished latent. A `Plan` holds no tensors; it is hashable, picklable and printable.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

T = TypeVar("T")

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Any:
        return lambda decorator: decorator


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def axis(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass that a method's configuration can contain; pydantic refuses unknown keys."""
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return dataclass(frozen=True)(cls)


def check_positive(name: str, value: int) -> None:
    """Raise ValueError, with the argument's name, unless its value is at least 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


@axis
class Sample:
    """The reward sees the cached sample x[N]."""

    kind: Literal["sample"] = "sample"


@dataclass(frozen=True)
class PosteriorMean:
    """The reward sees x[node] − sigma[node]·v[node]: the sample of the grid cut after `node`."""

    node: int
    kind: Literal["posterior_mean"] = "posterior_mean"


@dataclass(frozen=True)
class Renoised:
    """The reward sees y − s·v(y, N−1), s = sigma[N−1], at the fresh state y number `index` (DRaFT-LV, 2309.17400)."""

    index: int
    kind: Literal["renoised"] = "renoised"


Target = Sample | PosteriorMean | Renoised


@axis
class Similarity:
    """Weight a sample by 1/(max(d_j, tau) + max(d_0, tau)) (LeapAlign, 2604.15311); mask it beyond `max_distance`.

    `tau: None` keeps the weight at 1, so that the mask can be used alone.
    """

    tau: float | None
    max_distance: float | None = None

    def __post_init__(self) -> None:
        if self.tau is not None and not self.tau > 0:
            raise ValueError(f"tau must be above 0 (0.1 and 0.2 are the published values), got {self.tau}")
        if self.max_distance is not None and not self.max_distance > 0:
            raise ValueError(f"max_distance must be above 0, or null for no bound, got {self.max_distance}")


@dataclass(frozen=True)
class Segment:
    """One integration x[start] + Σ weights·v[supports]; a support with gain None is cached, any other is active.

    The segment spans the nodes start <= node < stop. Supports may lie before `start` (Adams–Bashforth). The gradient
    of support i is scaled by its gain: c[i] = weights[i]·gains[i]; the gain does not change the value.
    """

    start: int
    stop: int
    supports: tuple[int, ...]
    weights: tuple[float, ...]
    gains: tuple[float | None, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a segment needs 0 <= start < stop, got start {self.start}, stop {self.stop}")
        if not len(self.supports) == len(self.weights) == len(self.gains) > 0:
            raise ValueError(
                "a segment needs as many weights and gains as supports, and at least one, "
                f"got {len(self.supports)} supports, {len(self.weights)} weights, {len(self.gains)} gains"
            )
        if len(set(self.supports)) != len(self.supports):
            raise ValueError(f"supports of a segment must be distinct, got {self.supports}")
        if min(self.supports) < 0 or max(self.supports) >= self.stop:
            raise ValueError(f"supports must be in [0, stop) = [0, {self.stop}), got {self.supports}")

    @property
    def coefficients(self) -> dict[int, float]:
        """c[i] = w[i]·gain[i] of the active supports, in the order of the supports."""
        rows = zip(self.supports, self.weights, self.gains, strict=True)
        return {node: weight * gain for node, weight, gain in rows if gain is not None}


@dataclass(frozen=True)
class Branch:
    """A target and the one or two segments that end in it; with two, `coupling` is the alpha of the nested term."""

    target: Target
    segments: tuple[Segment, ...]
    coupling: float = 0.0

    def __post_init__(self) -> None:
        if len(self.segments) not in (1, 2):
            raise ValueError(f"a branch has one or two segments, got {len(self.segments)}")
        if not 0.0 <= self.coupling <= 1.0:
            raise ValueError(f"coupling must be in [0, 1], got {self.coupling}")
        if len(self.segments) == 1 and self.coupling > 0:
            raise ValueError(f"coupling needs two segments; write coupling: 0, got {self.coupling} with one segment")
        if len(self.segments) == 2:
            first, last = self.segments
            if first.stop != last.start:
                raise ValueError(
                    f"segments must meet: the first stops at {first.stop}, the last starts at {last.start}"
                )

    @property
    def junction(self) -> int | None:
        """The node j whose velocity is evaluated at alpha·y + (1−alpha)·stopgrad(y); None if there is none."""
        last = self.segments[-1]
        return last.start if self.coupling > 0 and last.start in last.coefficients else None


@dataclass(frozen=True)
class Term:
    """One vector–Jacobian product: the cotangent of v at `Plan.states[state]` is c_last·u + c_first·u'."""

    branch: int
    state: int
    node: int
    c_last: float
    c_first: float
    is_junction: bool = False
    alpha: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The surrogate of one sample: its branches, and how the sample is weighted.

    Without any active support the sample is only drawn and scored: it has no states and no terms.
    """

    num_steps: int
    branches: tuple[Branch, ...]
    similarity: Similarity | None = None

    def __post_init__(self) -> None:
        if self.num_steps < 1 or not self.branches:
            raise ValueError(
                f"a plan needs steps and branches, got {self.num_steps} steps, {len(self.branches)} branches"
            )
        for branch in self.branches:
            _check_branch(branch, self.num_steps)

    @property
    def states(self) -> tuple[tuple[int, int | None], ...]:
        """The states that the learner needs, sorted by node: (node, None) is x[node], (N−1, m) the fresh state y[m]."""
        found = {
            (node, branch.target.index if isinstance(branch.target, Renoised) else None)
            for branch in self.branches
            for segment in branch.segments
            for node in segment.coefficients
        }
        return tuple(sorted(found, key=lambda state: (state[0], -1 if state[1] is None else state[1])))

    @property
    def renoised(self) -> int:
        """The number of fresh states y that the plan needs."""
        return sum(isinstance(branch.target, Renoised) for branch in self.branches)

    @property
    def stop(self) -> int:
        """The number of steps that a rollout takes until it has all the values of the plan: N, or e + 1 where the
        reward sees the posterior mean at node e."""
        return max(branch.segments[-1].stop for branch in self.branches)

    def terms(self) -> tuple[Term, ...]:
        """One entry per VJP; a node that is active in both segments is one entry."""
        position = {state: i for i, state in enumerate(self.states)}
        rows = []
        for b, branch in enumerate(self.branches):
            fresh = branch.target.index if isinstance(branch.target, Renoised) else None
            last = branch.segments[-1].coefficients
            first = branch.segments[0].coefficients if len(branch.segments) == 2 else {}
            for node in sorted({*last, *first}):
                joint = node == branch.junction
                alpha = branch.coupling if joint else 0.0
                c_last, c_first = last.get(node, 0.0), first.get(node, 0.0)
                rows.append(Term(b, position[node, fresh], node, c_last, c_first, joint, alpha))
        return tuple(rows)

    def describe(self) -> str:
        """A readable table: per branch its target and segments, per support its weight, gain and c."""
        lines = [f"plan over {self.num_steps} steps, {len(self.states)} states, {len(self.terms())} VJPs"]
        for b, branch in enumerate(self.branches):
            target = " ".join(str(value) for value in reversed(asdict(branch.target).values()))
            lines.append(f"branch {b}: target {target}, coupling {branch.coupling:g}")
            for segment in branch.segments:
                lines.append(f"  segment [{segment.start}, {segment.stop})")
                lines.append("      node     weight       gain          c")
                lines += _rows(segment, branch.junction)
        if self.similarity is not None:
            lines.append(f"similarity: tau {self.similarity.tau}, max distance {self.similarity.max_distance}")
        return "\n".join(lines)


def _rows(segment: Segment, junction: int | None) -> list[str]:
    """One line per active support, and one line for all cached supports."""
    rows = []
    for node, weight, gain in zip(segment.supports, segment.weights, segment.gains, strict=True):
        mark = "  <- junction" if node == junction and node == segment.start else ""
        if gain is not None:
            rows.append(f"    {node:6d} {weight:10.6f} {gain:10.6f} {weight * gain:10.6f}{mark}")
    cached = [w for w, gain in zip(segment.weights, segment.gains, strict=True) if gain is None]
    if cached:
        rows.append(f"    cached {sum(cached):10.6f}  over {len(cached)} nodes")
    return rows


def _check_branch(branch: Branch, num_steps: int) -> None:
    """Raises ValueError for a target outside the grid, or segments that do not end in their target."""
    target, last = branch.target, branch.segments[-1]
    end = target.node + 1 if isinstance(target, PosteriorMean) else num_steps
    if not 1 <= end <= num_steps:
        raise ValueError(f"a posterior mean's node must be in [0, {num_steps - 1}], got {end - 1}")
    if last.stop != end:
        raise ValueError(f"the last segment must stop at {end} (its target's last node plus one), got {last.stop}")
    if isinstance(target, Renoised) and (len(branch.segments) != 1 or last.supports != (num_steps - 1,)):
        raise ValueError(f"a renoised target has one segment with the single support {num_steps - 1}")
