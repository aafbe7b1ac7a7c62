"""The numbers of samplers and reward servers, changed between two steps by hand (`flowbp-ray scale`) or by a rule.

The rule reads the metrics of the last WINDOW steps. The busy share of a role is its seconds of work divided by (serving
processes · step seconds).
- If the learners waited more than WAITS of the time and the busier role idles at most IDLES: one process more for it.
  If neither role is that busy, the learners wait for the stages that one batch passes through in sequence, and more
  processes would not help.
- If a role that the learners do not wait for idles more than IDLES of the time, and its busy share would stay within
  FULL with one process fewer: one fewer.
After a change the rule waits WINDOW steps to see the effect. It adds no process to a role while another one is still
starting. The results of a run do not depend on these numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import ConfigError
from flowbp_ray.utils.files import write_atomically

ROLES = ("samplers", "rewards")
"""The roles whose numbers of processes can change."""
WORK = {"samplers": ("sampler_s", "load_s"), "rewards": ("reward_s",), "learners": ("learner_s", "publish_s")}
"""Role -> the metrics with its seconds of work: summed over its processes; for the learners those of the slowest."""
WINDOW = 5  # steps
WAITS = 0.10
IDLES = 0.20
FULL = 0.95  # a role never shrinks beyond this utilisation

Counts = Mapping[str, int]  # role -> processes
Bounds = Mapping[str, tuple[int, int]]  # role -> fewest and most


def bounds(config: RunConfig) -> dict[str, tuple[int, int]]:
    return {role: getattr(config, role).bounds for role in ROLES}


def rule(config: RunConfig, counts: Counts, serving: Counts, steps: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """The new size of the role that should change; empty if none should.

    counts: the sizes that were asked for. serving: the processes that are ready. steps: metrics since the last change.
    """
    if len(steps) < WINDOW:
        return {}
    steps, limits, others = steps[-WINDOW:], bounds(config), list(ROLES)
    seconds = sum(step["step_s"] for step in steps)
    busy = {role: busy_share(role, steps, serving[role], seconds) for role in ROLES}
    if sum(step["wait_s"] for step in steps) > WAITS * seconds:
        role = max(busy, key=lambda name: busy[name])
        if busy[role] < 1 - IDLES or counts[role] > serving[role]:
            return {}
        if counts[role] < limits[role][1]:
            return {role: counts[role] + 1}
        others.remove(role)
    for role in others:
        fewer = counts[role] - 1
        spare = busy[role] < 1 - IDLES and busy[role] * serving[role] <= FULL * fewer
        if fewer >= limits[role][0] and counts[role] == serving[role] and spare:
            return {role: fewer}
    return {}


def parse(limits: Bounds, sizes: Sequence[str]) -> dict[str, int]:
    """Parse sizes such as `samplers=6` into role -> size. Raises ConfigError for bad syntax or a size out of limits."""
    found = {}
    for text in sizes:
        role, _, number = text.partition("=")
        if role not in ROLES or not (number.isascii() and number.isdigit()):
            raise ConfigError(f"{text!r} is not understood; write samplers=6 or rewards=2")
        least, most = limits[role]
        if not least <= int(number) <= most:
            raise ConfigError(
                f"{role}={number} is beyond {role}.min={least} and {role}.max={most}, with which the run was started"
            )
        found[role] = int(number)
    if not found:
        raise ConfigError("no size given; write samplers=6 or rewards=2")
    return found


def request(run: Run, sizes: Counts) -> None:
    """Write one file per role, which the run reads between two steps; a later request replaces an earlier one."""
    for role, size in sizes.items():
        write_atomically(request_file(run, role), partial(Path.write_text, data=f"{size}\n"))


def pending_requests(run: Run) -> dict[str, int]:
    """The requested sizes that the run has not taken yet."""
    found = {role: _read(request_file(run, role)) for role in ROLES}
    return {role: size for role, size in found.items() if size is not None}


def take_requests(run: Run) -> dict[str, int]:
    """Return and remove the requested sizes. A request that arrives during this call is kept for the next call."""
    found = {}
    for role in ROLES:
        taken = request_file(run, role).with_suffix(".taken")
        with suppress(OSError):
            request_file(run, role).rename(taken)
            found[role] = _read(taken)
            taken.unlink()
    return {role: size for role, size in found.items() if size is not None}


def discard_requests(run: Run) -> None:
    """Remove all requests."""
    take_requests(run)


def request_file(run: Run, role: str) -> Path:
    return run.folder / f"scale_{role}.txt"


def _read(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def busy_share(role: str, steps: Sequence[Mapping[str, float]], processes: float, seconds: float) -> float:
    """The share of `seconds` in which a role's processes worked. steps: the metrics of all steps in that time."""
    return sum(step[key] for step in steps for key in WORK[role]) / (processes * seconds)


def idle(step: Mapping[str, float], counts: Mapping[str, float], step_s: float) -> dict[str, float]:
    """`idle/<role>`: the share of a step of `step_s` seconds in which a role's processes did not compute.

    step: its metrics, or means of them. counts: the processes of samplers and rewards. The learner ranks work in
    lockstep and count as one process.
    """
    processes = {"samplers": counts["samplers"], "learners": 1, "rewards": counts["rewards"]}
    return {f"idle/{role}": max(0.0, 1 - busy_share(role, [step], n, step_s)) for role, n in processes.items()}
