"""Draw where the gradient of each named method flows, from the plan that it draws: `python -m benchmarks.site.figures`.

Everything in a picture is read from a `Plan`: its branches, segments, supports, coefficients and terms.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from benchmarks.site import drawing as d
from flowbp_ray.backbones.sigmas import static_shift
from flowbp_ray.surrogate import METHODS, Plan
from flowbp_ray.surrogate.plan import Branch, PosteriorMean, Renoised, Term
from flowbp_ray.utils.random import stream

STEPS, SEED, STEP, DRAWS = 16, 114, 3, 500
WIDTH, HEIGHT = 860, 396
LEFT, GAP, LINE, BUS = 56, 42, 220, 306
END = LEFT + STEPS * GAP
FOLDER = Path(__file__).parents[2] / "docs" / "figures"
Point = tuple[float, float]


def drawn(name: str, step: int = STEP) -> Plan:
    """The plan of the named method at its defaults in one step of a run: 16 sampling steps, plan seed 114."""
    return METHODS[name]().plan(static_shift(STEPS), stream(SEED, "plan", step))


def figures() -> dict[str, str]:
    """All pictures by file name."""
    return {f"{name}.svg": figure(name, drawn(name)) for name in METHODS} | {"active_nodes.svg": overview()}


def figure(name: str, plan: Plan) -> str:
    """A plan as SVG: the trajectory, the connectors above it, and below it what the reward's gradient reaches."""
    arguments = ", ".join(f"{p.name}={p.default}" for p in inspect.signature(METHODS[name]).parameters.values())
    nodes = sorted({term.node for term in plan.terms()})
    active = f"active node{'s' * (len(nodes) > 1)}: {', '.join(map(str, nodes))}"
    said = f"{active}; {_count(len(plan.states), 'state')} kept, {_count(len(plan.terms()), 'product')} with v"
    elements = [d.text(24, 34, name, size=18, more=" font-weight='600'"), d.text(24, 56, arguments, d.GREY)]
    elements += [d.text(WIDTH - 24, 34, said, anchor="end"), *_trajectory(plan)]
    scale = 4.5 / max(abs(term.c_last) + abs(term.c_first) for term in plan.terms())
    for number, branch in enumerate(plan.branches):
        terms = [term for term in plan.terms() if term.branch == number]
        elements += _renoised(branch, terms, scale) if isinstance(branch.target, Renoised) else _connectors(branch)
        if not isinstance(branch.target, Renoised):
            elements += _gradients(branch, terms, scale)
    return d.document(WIDTH, HEIGHT, f"Where the gradient of {name} flows", said, [*elements, *_legend(plan)])


def overview() -> str:
    """How often each node is active, over the plans of 500 steps, of every method at its defaults."""
    elements = [d.text(24, 34, "How often each node is active", size=18, more=" font-weight='600'")]
    elements.append(d.text(24, 56, f"a circle's area is the share of {DRAWS} plans; 16 sampling steps", d.GREY))
    left, gap = 190, 41
    for column in range(STEPS):
        elements.append(d.text(left + column * gap, 86, str(column), d.GREY, 11, "middle"))
    for row, name in enumerate(METHODS):
        y = 116 + row * 38
        elements += [d.text(24, y + 4, name), d.line(left - 20, y, left + 15.5 * gap, y, d.PALE, 1)]
        for node, share in enumerate(shares(name)):
            if share:
                elements.append(d.circle(left + node * gap, y, 17 * share**0.5, d.LAST, "#ffffff", 0))
    bottom = 116 + len(METHODS) * 38
    elements.append(d.text(left, bottom, "noise", d.GREY, 12, "middle"))
    elements.append(d.text(left + 15 * gap, bottom, "last step", d.GREY, 12, "middle"))
    return d.document(
        WIDTH, bottom + 20, "How often each node is active", "One row per method, one column per node", elements
    )


def shares(name: str, draws: int = DRAWS) -> list[float]:
    """The share of `draws` plans in which each of the nodes 0 … N − 1 is active."""
    found = [0] * STEPS
    for step in range(draws):
        for node in {term.node for term in drawn(name, step).terms()}:
            found[node] += 1
    return [count / draws for count in found]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _at(node: int) -> Point:
    return LEFT + node * GAP, LINE


def _fresh(index: int) -> Point:
    """Where the renoised state y[index] is drawn: above the last node."""
    return LEFT + (STEPS - 1) * GAP - 4, LINE - 98 - 36 * index


def _trajectory(plan: Plan) -> list[str]:
    """The cached states and what is sampled of them, what each node is to the plan, and what the reward sees."""
    stop, end = plan.stop, (END, LINE)
    first = plan.branches[0]
    elements = [d.line(*_at(0), *_at(stop - 1), d.PALE, 3)]
    leap = isinstance(first.target, PosteriorMean)
    elements.append(d.line(*_at(stop - 1), *end, d.PALE, 3, " stroke-dasharray='3 5'" if leap else ""))
    used = {node for branch in plan.branches for segment in branch.segments for node in segment.supports}
    lasting = {node for branch in plan.branches for node in branch.segments[-1].coefficients}
    active = {term.node for term in plan.terms()}
    for node in range(STEPS):
        x, y = _at(node)
        if node in active:
            elements.append(d.circle(x, y, 8, d.LAST if node in lasting else d.FIRST, "#ffffff"))
        elif node in used:
            elements.append(d.circle(x, y, 5, d.GREY, "#ffffff"))
        else:
            elements.append(d.circle(x, y, 5, "#ffffff", d.PALE, 1.5, "" if node < stop else " stroke-dasharray='2 2'"))
        elements.append(d.text(x, y + 25, str(node), d.INK if node in active else d.GREY, 11, "middle"))
        if node == first.junction:
            elements.append(d.circle(x, y, 12, "none", d.NESTED, 2))
    seen = "posterior mean" if leap else "image x[16]"
    elements += [d.circle(*end, 7, d.INK, "#ffffff"), d.text(END + 14, LINE - 13, seen, d.INK, 12)]
    elements.append(d.text(END + 14, LINE + 5, "reward", d.REWARD, 14, more=" font-weight='600'"))
    return [*elements, d.text(LEFT - 14, LINE + 4, "noise", d.GREY, 12, "end")]


def _connectors(branch: Branch) -> list[str]:
    """Each segment as an arc from the state where it starts to the state, or target, where it ends."""
    elements = []
    for index, segment in enumerate(branch.segments):
        last = index == len(branch.segments) - 1
        colour, start = (d.LAST if last else d.FIRST), _at(segment.start)
        end = (END, LINE) if last else _at(segment.stop)
        height = 20 + 66 * (end[0] - start[0]) / (END - LEFT)
        ends = (start[0], start[1] - 12), (end[0], end[1] - 14)
        elements.append(d.arc(*ends, height, colour, 2, d.arrow(colour)))
        middle = (start[0] + end[0]) / 2, LINE - 24 - height
        cached = sum(gain is None for gain in segment.gains)
        words = f"{len(segment.coefficients)} active" + (f", {cached} cached" if cached else "")
        elements.append(d.text(*middle, words, colour, 12, "middle"))
    return elements


def _gradients(branch: Branch, terms: list[Term], scale: float) -> list[str]:
    """From the reward to each active node, as wide as |c|; from the junction on to the first segment, times alpha."""
    leftmost = min(_at(term.node)[0] for term in terms)
    bus = f"M{END + 54} {LINE + 14} L{END + 54} {BUS} L{d.number(leftmost)} {BUS}"
    elements = [f"<path d='{bus}' fill='none' stroke='{d.REWARD}' stroke-width='1.5'/>"]
    previous = -99.0
    for term in terms:
        x, size = _at(term.node)[0], abs(term.c_last) + abs(term.c_first)
        elements.append(d.line(x, BUS, x, LINE + 33, d.REWARD, max(1.2, scale * size), d.arrow(d.REWARD)))
        row = 0 if x - previous > GAP else 13
        previous = x if not row else -99.0
        elements.append(d.text(x, BUS + 17 + row, f"{size:.2g}" if size else "0", d.REWARD, 11, "middle"))
    return elements + _nested(branch, terms)


def _nested(branch: Branch, terms: list[Term]) -> list[str]:
    """From the junction's state on to the active nodes of the first segment, times the coupling."""
    if branch.junction is None:
        return []
    start, y = _at(branch.junction)[0], BUS - 26
    reached = [_at(term.node)[0] + 9 for term in terms if term.c_first]
    dashes = " stroke-dasharray='5 4'"
    elements = [d.line(start, y, min(reached), y, d.NESTED, 2, dashes), d.circle(start, y, 3.5, d.NESTED, "#ffffff", 1)]
    elements += [d.line(x, y, x, LINE + 33, d.NESTED, 2, d.arrow(d.NESTED)) for x in reached]
    return [*elements, d.text(start + 7, y + 4, f"× {branch.coupling:g}", d.NESTED, 12)]


def _renoised(branch: Branch, terms: list[Term], scale: float) -> list[str]:
    """A fresh state, its one step to a target of its own, and the gradient that comes back through it."""
    assert isinstance(branch.target, Renoised)
    x, y = _fresh(branch.target.index)
    end = END + 4
    elements = [d.line(END, LINE, x, y, d.PALE, 1.5, " stroke-dasharray='2 4'"), d.circle(x, y, 8, d.LAST, "#ffffff")]
    elements += [
        d.line(x + 10, y - 5, end - 8, y - 5, d.LAST, 2, d.arrow(d.LAST)),
        d.circle(end, y, 6, d.INK, "#ffffff"),
    ]
    elements.append(d.text(x - 14, y + 4, f"noised again, y[{branch.target.index}]", d.INK, 12, "end"))
    for term in terms:
        size = abs(term.c_last)
        elements.append(d.line(end - 8, y + 6, x + 12, y + 6, d.REWARD, max(1.2, scale * size), d.arrow(d.REWARD)))
        elements.append(d.text(end + 14, y + 5, f"reward, {size:.2g}", d.REWARD, 12))
    return elements


def _legend(plan: Plan) -> list[str]:
    """What the colours of this picture mean, in one row."""
    y, x, elements = HEIGHT - 24, 24.0, [d.line(24, HEIGHT - 46, WIDTH - 24, HEIGHT - 46, d.PALE, 1)]
    two = any(len(branch.segments) == 2 for branch in plan.branches)
    marks = [(d.LAST, 7, "active, 2nd connector" if two else "active"), (d.FIRST, 7, "active, 1st connector")]
    marks = [mark for mark in marks if two or mark[0] != d.FIRST]
    marks += [(d.GREY, 5, "cached, no gradient"), ("#ffffff", 5, "not used")]
    for fill, radius, words in marks:
        stroke = d.PALE if fill == "#ffffff" else "#ffffff"
        elements += [d.circle(x + 7, y - 4, radius, fill, stroke), d.text(x + 19, y, words, d.INK, 12)]
        x += 36 + 5.8 * len(words)
    elements += [d.line(x + 22, y - 4, x + 2, y - 4, d.REWARD, 2.5, d.arrow(d.REWARD))]
    elements.append(d.text(x + 28, y, "gradient, × |c|", d.INK, 12))
    if any(branch.junction is not None for branch in plan.branches):
        x += 126
        elements.append(d.line(x + 22, y - 4, x + 2, y - 4, d.NESTED, 2, d.arrow(d.NESTED) + " stroke-dasharray='5 4'"))
        elements.append(d.text(x + 28, y, "by the junction", d.INK, 12))
    return elements


def main() -> None:
    """Write the pictures of docs/figures."""
    FOLDER.mkdir(exist_ok=True)
    for name, picture in figures().items():
        (FOLDER / name).write_text(picture)
        print(FOLDER / name)


if __name__ == "__main__":
    main()
