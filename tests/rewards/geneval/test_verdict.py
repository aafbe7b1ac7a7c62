"""GenEval's prompt format and verdicts, against verdicts worked out by hand from the published rules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbp_ray.rewards.geneval import Detection, GenEvalVerdict, Task, Thresholds, keep, load, relations, verdict
from flowbp_ray.rewards.geneval.names import OBJECTS, published
from flowbp_ray.rewards.geneval.prompts import parse
from flowbp_ray.rewards.geneval.verdict import iou

DOG, CAT = (0.0, 0.0, 10.0, 10.0), (40.0, 0.0, 50.0, 10.0)  # the dog is left of the cat

SINGLE = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
TWO = {
    "tag": "two_object",
    "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}],
    "prompt": "a photo of a dog and a cat",
}
COUNTING = {
    "tag": "counting",
    "include": [{"class": "clock", "count": 2}],
    "exclude": [{"class": "clock", "count": 3}],
    "prompt": "a photo of two clocks",
}
COLOURS = {
    "tag": "colors",
    "include": [{"class": "car", "count": 1, "color": "pink"}],
    "prompt": "a photo of a pink car",
}
POSITION = {
    "tag": "position",
    "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
    "prompt": "a photo of a dog left of a cat",
}
BINDING = {
    "tag": "color_attr",
    "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "book", "count": 1, "color": "blue"}],
    "prompt": "a photo of a red cup and a blue book",
}


def found(noun: str, *scores: float, box: tuple[float, float, float, float] = DOG) -> list[Detection]:
    return [Detection(noun, score, box) for score in scores]


def judged(row: dict, objects: Sequence[Detection], colours: dict[float, str] | None = None) -> GenEvalVerdict:
    """The verdict with the published numbers; colours: what is seen on the detection with that score."""
    task = parse(row)
    return verdict(
        task, keep(objects, task.tag, Thresholds()), lambda _, some: [(colours or {})[d.score] for d in some]
    )


CASES = [
    # one object: a score of exactly 0.3 is not above it
    (SINGLE, found("bench", 0.31), {}, True),
    (SINGLE, found("bench", 0.30), {}, False),
    (SINGLE, found("chair", 0.99), {}, False),
    (SINGLE, found("bench", 0.9, 0.8, 0.7), {}, True),  # more than one is still a bench
    # two: both must be there
    (TWO, [*found("dog", 0.9), *found("cat", 0.4)], {}, True),
    (TWO, found("dog", 0.9, 0.9), {}, False),
    # counting: only above 0.9, and not one more
    (COUNTING, found("clock", 0.95, 0.91), {}, True),
    (COUNTING, found("clock", 0.95, 0.90), {}, False),
    (COUNTING, found("clock", 0.95, 0.91, 0.90), {}, True),
    (COUNTING, found("clock", 0.95, 0.94, 0.93), {}, False),
    # colours: asked of the surest car only
    (COLOURS, found("car", 0.8, 0.6), {0.8: "pink", 0.6: "red"}, True),
    (COLOURS, found("car", 0.6, 0.8), {0.8: "red", 0.6: "pink"}, False),
    (COLOURS, [], {}, False),
    # position: of the surest dog against the surest cat
    (POSITION, [*found("dog", 0.9), *found("cat", 0.9, box=CAT)], {}, True),
    (POSITION, [*found("dog", 0.9, box=CAT), *found("cat", 0.9)], {}, False),
    (POSITION, [*found("dog", 0.9), *found("cat", 0.9)], {}, False),  # one on the other
    (POSITION, [*found("dog", 0.9), *found("dog", 0.8, box=CAT), *found("cat", 0.9, box=CAT)], {}, True),
    (POSITION, found("dog", 0.9), {}, False),  # nothing to be left of
    # attribute binding: the colours must be on the right objects
    (BINDING, [*found("cup", 0.9), *found("book", 0.8)], {0.9: "red", 0.8: "blue"}, True),
    (BINDING, [*found("cup", 0.9), *found("book", 0.8)], {0.9: "blue", 0.8: "red"}, False),
    (BINDING, found("cup", 0.9), {0.9: "red"}, False),
]


@pytest.mark.parametrize(("row", "objects", "colours", "correct"), CASES)
def test_verdicts_worked_out_by_hand(
    row: dict, objects: list[Detection], colours: dict[float, str], correct: bool
) -> None:
    answer = judged(row, objects, colours)
    assert answer.correct is correct
    assert bool(answer.reasons) is not correct


def test_reasons_name_what_is_wrong() -> None:
    assert judged(COUNTING, found("clock", 0.95, 0.94, 0.93)).reasons == ("3 × clock where fewer than 3 are asked for",)
    assert judged(TWO, found("dog", 0.9)).reasons == ("0 × cat where 1 are asked for",)
    assert judged(COLOURS, found("car", 0.8), {0.8: "red"}).reasons == ("car is red where pink is asked for",)
    assert judged(POSITION, found("dog", 0.9)).reasons == (
        "0 × cat where 1 are asked for",
        "nothing for dog to be left of",
    )
    assert judged(POSITION, [*found("dog", 0.9, box=CAT), *found("cat", 0.9)]).reasons == (
        "dog is right of cat where left of is asked for",
    )


def test_every_object_of_a_group_must_be_in_place() -> None:
    task = parse(
        {
            "tag": "position",
            "include": [{"class": "cat", "count": 2}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
            "prompt": "",
        }
    )
    far = (80.0, 0.0, 90.0, 10.0)
    cats = [*found("cat", 0.9, box=far), *found("cat", 0.8, box=CAT)]
    assert verdict(task, {"cat": cats, "dog": found("dog", 0.9)}, _none).correct
    assert not verdict(task, {"cat": cats, "dog": found("dog", 0.9, box=(60, 0, 70, 10))}, _none).correct


def _none(noun: str, some: Sequence[Detection]) -> list[str]:
    raise AssertionError(f"nobody asked for the colour of {noun}")


def test_no_colour_is_asked_for_where_too_few_were_found() -> None:
    assert not verdict(parse(COLOURS), {}, _none).correct


@pytest.mark.parametrize(
    ("d", "expected"),
    # both boxes are 10 wide, so the slack is 0.1 · 20 = 2 and the share along x is (d − 2) / d: above 1/2 from d = 4
    [(1.0, set()), (2.0, set()), (3.9, set()), (4.0, set()), (4.1, {"left of"}), (100.0, {"left of"})],
)
def test_left_of_begins_where_the_formula_says(d: float, expected: set[str]) -> None:
    assert relations((0, 0, 10, 10), (d, 0, 10 + d, 10)) == expected


@pytest.mark.parametrize(
    # on the diagonal each share is (d − 2) / (√2 d): above 1/2 from d = 2 / (1 − √2 / 2) = 6.828…
    ("d", "expected"),
    [(6.8, set()), (6.9, {"left of", "above"})],
)
def test_both_relations_hold_on_a_diagonal(d: float, expected: set[str]) -> None:
    assert relations((0, 0, 10, 10), (d, d, 10 + d, 10 + d)) == expected


def test_wide_boxes_one_above_the_other() -> None:
    """Offset (0, −20), slack (20, 2): d = (0, −18/20). At threshold 0.5 the slack is 10: d = (0, −1/2), too little."""
    top, bottom = (0, 0, 100, 10), (0, 20, 100, 30)
    assert relations(top, bottom) == {"above"} and relations(bottom, top) == {"below"}
    assert relations(top, bottom, threshold=0.5) == set()


sides = st.floats(-500, 500, allow_nan=False).map(lambda v: round(v, 2))
boxes = st.tuples(sides, sides, sides, sides).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TURNED = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}


@given(boxes, boxes)
def test_relations_turn_with_the_picture(a: tuple, b: tuple) -> None:
    assert relations(b, a) == {OPPOSITE[r] for r in relations(a, b)}
    transposed = [(top, left, bottom, right) for left, top, right, bottom in (a, b)]
    assert relations(*transposed) == {TURNED[r] for r in relations(a, b)}
    assert not {"left of", "right of"} <= relations(a, b) and not {"above", "below"} <= relations(a, b)


def test_keep_takes_the_surest_sixteen_of_each_class() -> None:
    objects = [*found("dog", *(0.31 + i / 100 for i in range(20))), *found("cat", 0.5, 0.2)]
    kept = keep(objects, "two_object", Thresholds())
    assert [d.score for d in kept["dog"]] == sorted((0.31 + i / 100 for i in range(4, 20)), reverse=True)
    assert [d.score for d in kept["cat"]] == [0.5]
    assert keep(found("dog", 0.2), "colors", Thresholds()) == {}


def test_overlapping_boxes_of_one_class_are_thinned_where_asked() -> None:
    """Boxes of 10 × 10 pixels (ends count) that share 5 × 10 have an IoU of 50 / 150; of 8 × 10, 80 / 120."""
    first, half, most = (0, 0, 9, 9), (5, 0, 14, 9), (2, 0, 11, 9)
    assert iou(first, half) == pytest.approx(1 / 3) and iou(first, most) == pytest.approx(2 / 3)
    objects = [Detection("dog", 0.9, first), Detection("dog", 0.8, most), Detection("dog", 0.7, half)]
    objects.append(Detection("cat", 0.6, first))

    def left(overlap: float) -> list[float]:
        return [d.score for d in keep(objects, "two_object", Thresholds(overlap=overlap))["dog"]]

    assert left(1.0) == [0.9, 0.8, 0.7]
    assert left(0.5) == [0.9, 0.7]
    assert left(0.3) == [0.9]
    assert len(keep(objects, "two_object", Thresholds(overlap=0.3))["cat"]) == 1


def test_a_file_is_read_by_prompt(tmp_path: Path) -> None:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (SINGLE, TWO, COUNTING, COLOURS, POSITION, BINDING)))
    tasks = load(path)
    assert [task.tag for task in tasks.values()] == [
        "single_object",
        "two_object",
        "counting",
        "colors",
        "position",
        "color_attr",
    ]
    position = tasks["a photo of a dog left of a cat"]
    assert isinstance(position, Task) and position.include[1].position == ("left of", 0)
    assert position.nouns == {"cat", "dog"}
    assert tasks["a photo of two clocks"].exclude[0].count == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "a text under 'prompt'"),
        ({"tag": None}, "has no tag"),
        ({"include": []}, "asks for nothing"),
        ({"include": ["dog"]}, "a text under 'class'"),
        ({"include": [{"class": "dog"}]}, "count of 'dog' must be a whole number from 1, not None"),
        ({"include": [{"class": "dog", "count": 0}]}, "not 0"),
        ({"include": [{"class": "dog", "count": 1, "color": "teal"}]}, "'teal' of 'dog' is none of red"),
        ({"include": [{"class": "dog", "count": 1, "position": ["near", 0]}]}, "must be .left of"),
        ({"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "must point at an earlier include"),
    ],
)
def test_what_is_not_in_the_format_is_named_with_its_line(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(SINGLE) + "\n" + json.dumps({**TWO, **change}) + "\n")
    with pytest.raises(ValueError, match=f"line 2: .*{message}"):
        load(path)


def test_one_prompt_cannot_ask_for_two_things(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(SINGLE) + "\n" + json.dumps({**TWO, "prompt": SINGLE["prompt"]}) + "\n")
    with pytest.raises(ValueError, match="line 2: 'a photo of a bench' is there twice"):
        load(path)
    path.write_text(json.dumps(SINGLE) + "\n" + json.dumps(SINGLE) + "\n")
    assert len(load(path)) == 1


def test_the_eighty_names_and_what_others_call_them() -> None:
    """COCO's contiguous numbers of a few things; Pascal VOC's twenty classes all have one of the eighty names."""
    known = {0: "person", 15: "cat", 62: "tv", 64: "computer mouse", 65: "tv remote", 66: "computer keyboard"}
    assert {i: OBJECTS[i] for i in known} == known
    assert len(set(OBJECTS)) == 80 and OBJECTS[79] == "toothbrush"
    text = (
        "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant"
        " sheep sofa train tvmonitor"
    )
    voc = text.split()
    assert len({published(label) for label in voc} & set(OBJECTS)) == 20
    assert [published(label) for label in ("mouse", "remote", "keyboard", "Dining_Table")] == [
        "computer mouse",
        "tv remote",
        "computer keyboard",
        "dining table",
    ]


@pytest.mark.parametrize("wrong", [{"score": 1.5}, {"objects": 0}, {"position": -0.1}])
def test_thresholds_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="GenEval"):
        Thresholds(**wrong)
