"""The sections of a run's page about held-out prompts: pictures, tables before and after, the guidance curve."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from flowbp_ray.artifacts import charts
from flowbp_ray.artifacts.findings import Findings, direction, highest, mean_of, percent, said, whole
from flowbp_ray.artifacts.held_out import Pair, Part, read_pairs
from flowbp_ray.artifacts.markup import SMALL, data_url, details, note, section, table, text
from flowbp_ray.artifacts.report import table_rows

PICTURES = 1_900_000  # characters of the page that pictures may take
MOST = 24  # pairs at one guidance
DASH = "–"


def pictures(found: Findings) -> str:
    """Pairs with a slider each, and one for all, by guidance."""
    groups: list[tuple[float, str]] = []
    used, both, order = 0, False, _order(found)
    for place, guidance in enumerate(order):  # one after the other: the sheets of one may take hundreds of MB
        pairs = read_pairs(found.run, found.held_out, found.prompts, guidance)
        both |= found.held_out.last is not None and any(pair.after is not None for pair in pairs)
        room = (PICTURES - used) // (len(order) - place)
        blocks: list[str] = []
        count = min(MOST, len(pairs))
        for i in range(count):
            block = _pair(found, pairs[i * len(pairs) // count])
            if sum(map(len, blocks)) + len(block) > room:
                break
            blocks.append(block)
        used += sum(map(len, blocks))
        if blocks:
            shown = f"{len(blocks)} of the {len(pairs)} pictures in images/, not chosen by hand."
            groups.append((guidance, note(shown) + f'<div class="pairs">{"".join(blocks)}</div>'))
    if not groups:
        return section("pictures", "Pictures", note(_without_pictures(found)))
    parts = [note(_about_pictures(found, both)), _SLIDER if both else ""]
    parts += [details(f"guidance {g:g}", inner, opened=i == 0) for i, (g, inner) in enumerate(groups)]
    return section("pictures", "Before and after" if both else "Before", *parts)


_SLIDER = (
    '<p class="all"><label for="all">all pictures</label><span>after</span>'
    '<input id="all" type="range" min="0" max="100" value="50"><span>before</span>'
    '<label><input id="beside" type="checkbox"> side by side</label></p>'
)


def _about_pictures(found: Findings, both: bool) -> str:
    held = found.held_out
    if not both:
        return f"Held-out prompts after step {held.first}; there are no pictures of a later evaluation yet."
    left = "left of the line the base" if held.first == 0 else f"left of the line step {held.first}"
    return (
        f"The same held-out prompts from the same noise: {left}, right of it step {held.last}. Drag a picture, or use "
        "the arrow keys on it." + (" ✓ and ✗: what the exact verifier says." if "verifier" in _metrics(found) else "")
    )


def _metrics(found: Findings) -> set[str]:
    """Of single pictures."""
    return {name for results in found.held_out.values.values() for e in results.values() for name in e.values}


def _without_pictures(found: Findings) -> str:
    if not found.config.evaluation.prompts:
        return "No pictures: `evaluation.prompts` is null, so nothing was drawn on held-out prompts."
    if found.held_out.first is None:
        return "No pictures yet: the first evaluation has not ended."
    return f"No pictures: images/ has no readable sheet of step {found.held_out.first}."


def _pair(found: Findings, pair: Pair) -> str:
    """A picture before and after, one above the other, and a range input over both."""
    small = " small" if pair.before.shape[1] <= SMALL else ""
    name = text(pair.text if pair.text is not None else f"held-out prompt {pair.number + 1}")
    before = f'<img class="before{small}" src="{data_url(pair.before)}" alt="before: {name}">'
    if pair.after is None:
        return f'<figure class="pair alone"><div class="stack">{before}</div><figcaption>{name}</figcaption></figure>'
    after = f'<img class="after{small}" src="{data_url(pair.after)}" alt="after: {name}">'
    slider = f'<input type="range" min="0" max="100" value="50" aria-label="before and after: {name}">'
    scores = "".join(f"<small>{line}</small>" for line in _scores(found, pair))
    return (
        f'<figure class="pair"><div class="stack">{after}{before}{slider}</div>'
        f"<figcaption>{name}{scores}</figcaption></figure>"
    )


def _scores(found: Findings, pair: Pair) -> Iterator[str]:
    """Verdicts, then what was only measured, then what was trained on; two lines at most."""
    for name in sorted(pair.scores, key=lambda n: (not percent(n), n in found.trained))[:2]:
        before, after = pair.scores[name]
        if percent(name):
            signs = " → ".join("✓" if v else "✗" for v in (before, after))
            kind = "up" if after > before else "down" if after < before else "same"
            yield f'{text(name)} <span class="{kind}">{signs}</span>'
        else:
            yield f"{text(name)} <span>{before:.2f} → {after:.2f}</span>"


def _order(found: Findings) -> list[float]:
    """The guidances, that of `Findings.guidance` first."""
    return sorted(found.held_out.parts, key=lambda g: (g != found.guidance, g))


def tables(found: Findings) -> str:
    """A table per guidance: each metric and skill before, after, the change, and where its interval lies."""
    held, settings = found.held_out, found.config.evaluation
    if held.first is None:
        what = "evaluation.prompts is null" if not settings.prompts else "the first evaluation has not ended"
        return section("measured", "Measured on held-out prompts", note(f"Nothing: {what}."))
    count = f"{len(found.prompts)} prompts of" if found.prompts else "Prompts of"
    steps = settings.num_steps or found.config.backbone.num_steps
    intro = f"{count} `{settings.prompts}`, {steps} sampling steps, fixed noise; means after step {held.first}"
    if held.last is not None:
        intro += f" and after step {held.last}. The change is paired, by prompt; points where a metric is in %"
    intro += f". Read from {held.source}"
    intro += ", which has no intervals." if held.source == "metrics.jsonl" else ", with 95 % intervals."
    if held.last is None:
        intro += " After that step nothing was measured yet."
    elif (newest := _newest(found)) > max(held.last, held.first or 0) and found.verdict is None:
        intro += f" The evaluation after step {newest} is in the curves; its intervals come with the next checkpoint."
    parts = [details(f"guidance {g:g}", _table(found, held.parts[g]), i == 0) for i, g in enumerate(_order(found))]
    return section("measured", "Measured on held-out prompts", note(intro), *parts)


def _newest(found: Findings) -> int:
    """The step of the newest evaluation in metrics.jsonl; -1 where there is none."""
    return max((int(line["step"]) for line in found.lines if line["kind"] == "evaluation"), default=-1)


def _table(found: Findings, part: Part) -> str:
    texts = {name: row for name, row in zip(_shared(part), table_rows(part), strict=True)}
    alone = table_rows({"before": part["before"], "after": part["before"], "change": {}})
    rows = []
    for name, (label, before, *_) in zip(part["before"], alone, strict=True):
        _, _, after, change = texts.get(name, (label, before, DASH, DASH))
        trained = ' <span class="tag">trained on</span>' if name in found.trained else ""
        shown = f'<span class="skill">{text(name.partition("/")[2])}</span>' if "/" in name else text(label) + trained
        cells = [_with_interval(before), _with_interval(after), _with_interval(change), _verdict(part, name)]
        rows.append([shown, *cells])
    return table(["", "before", "after", "change", "interval of the change"], rows, "measured")


def _shared(part: Part) -> list[str]:
    return [name for name in part["before"] if name in part["after"]]


def _with_interval(cell: str) -> str:
    """A cell of `table_rows`, its interval in small on a line of its own."""
    mean, bracket, interval = cell.partition(" [")
    return text(mean) + (f"<small>{text(interval.rstrip(']').replace(', ', ' to '))}</small>" if bracket else "")


def _verdict(part: Part, name: str) -> str:
    """The interval as a drawing and in words. Metrics and their skills share a scale."""
    change = part["change"].get(name)
    where = direction(change)
    if not where or change is None:
        return f'<span class="none">{"no interval" if name in part["after"] else DASH}</span>'
    root = name.partition("/")[0]
    alike = [c for n, c in part["change"].items() if n.partition("/")[0] == root and c["low"] is not None]
    extent = max(max(abs(c["low"]), abs(c["high"])) for c in alike) or 1.0
    kind = {"above zero": "up", "below zero": "down", "contains zero": "same"}[where]
    drawn = charts.interval_bar(change["mean"], change["low"], change["high"], extent)
    return f'<span class="{kind}">{drawn}{where}</span>'


def guidance_curve(found: Findings) -> str:
    """Each metric of both models over guidance, and where each is best."""
    parts = found.held_out.parts
    title = "Against guidance"
    if not parts:
        return ""
    if len(parts) == 1:
        one = next(iter(parts))
        hint = "`evaluation.guidance_ends=[1,1.5,2,3,4]` measures others before and after training"
        return section("guidance", title, note(f"Measured at guidance {one:g} only; {hint}."))
    names = [name for name in next(iter(parts.values()))["before"] if "/" not in name]
    drawn = "".join(_curve(found, name) for name in names)
    rows = [row for name in names if (row := _best(parts, name))]
    about = "What guidance alone gives the base, and what training adds to it. With classifier-free guidance above 1 "
    about += "each sampling step takes two forwards of the model instead of one."
    best = table(["best of each model", "base", "tuned"], rows, "best") if rows else ""
    return section("guidance", title, note(about), f'<div class="charts">{drawn}{best}</div>')


def _curve(found: Findings, name: str) -> str:
    lines, first = [], next(iter(found.held_out.parts.values()))["before"][name]
    for end, label in (("before", "base" if found.held_out.first == 0 else "before"), ("after", "tuned")):
        known = {g: part[end][name] for g, part in found.held_out.parts.items() if name in part[end]}
        points = sorted(known.items(), key=lambda point: point[0])
        ends = {side: [_bound(value, side) for _, value in points] for side in ("low", "high")}
        ys = [math.nan if (mean := mean_of(value)) is None else mean for _, value in points]
        if points:
            lines.append(charts.Series(label, [g for g, _ in points], ys, ends["low"], ends["high"]))
    tag = " (trained on)" if name in found.trained else ""
    return charts.line_chart(_shown(name, first) + tag, lines, "guidance", percent=percent(name))


def _bound(value: Any, side: str) -> float:
    bound = value.get(side) if isinstance(value, Mapping) else None
    return math.nan if bound is None else float(bound)


def _best(parts: Mapping[float, Part], name: str) -> list[str]:
    """A row: the metric, and for both models the highest mean with its guidance."""
    before, after = highest(parts, name, "before"), highest(parts, name, "after")
    if before is None or after is None:
        return []
    cells = [f"{text(said(name, v))}<small>guidance {g:g}</small>" for g, v in (before, after)]
    return [text(_shown(name, next(iter(parts.values()))["before"].get(name))), *cells]


def _shown(name: str, value: Any) -> str:
    """A metric's name as `table_rows` prints it: numbers of the whole set in words."""
    return name if isinstance(value, Mapping) else name.replace("_", " ")


def cards(found: Findings) -> str:
    """The metrics over all prompts at the first guidance, as figures with their change."""
    if found.guidance is None:
        return ""
    part = found.held_out.parts[found.guidance]
    texts = dict(zip(_shared(part), table_rows(part), strict=True))
    names = [name for name in whole(part) if name in texts]
    names.sort(key=lambda n: (not percent(n), n in found.trained))
    blocks = []
    for name in names[:4]:
        label, before, after, change = texts[name]
        where = direction(part["change"].get(name))
        kind = {"above zero": "up", "below zero": "down"}.get(where, "same")
        plain, _, interval = change.partition(" [")
        unit = " points" if percent(name) else ""
        within = f" ({interval.rstrip(']').replace(', ', ' to ')})" if interval else ""
        tag = "trained on" if name in found.trained else "only measured"
        blocks.append(
            f'<div class="card"><h3>{text(label)} <span class="tag">{tag}</span></h3>'
            f"<p>{text(before.partition(' [')[0])} → <b>{text(after.partition(' [')[0])}</b></p>"
            f'<p class="{kind}">{text(plain + unit + within)}</p></div>'
        )
    return f'<div class="cards">{"".join(blocks)}</div>' if blocks else ""
