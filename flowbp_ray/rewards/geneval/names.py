"""GenEval's 80 object names, and what the same objects are called elsewhere.

The names are COCO's 80 things (Lin et al. 2014, arXiv 1405.0312) in COCO's order, but for three that GenEval makes
plainer (prompts/object_names.txt of djghosh13/geneval): mouse, remote and keyboard. Checkpoints of transformers spell
some things as Pascal VOC does (aeroplane, tvmonitor); with both spellings in the table either reads right.
"""

from __future__ import annotations

_THINGS = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
clock, vase, scissors, teddy bear, hair drier, toothbrush
"""

OBJECTS: tuple[str, ...] = tuple(name.strip() for name in _THINGS.split(","))
"""In the order of the detector's classes 0…79."""

ELSEWHERE: dict[str, str] = {
    # COCO's own name
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    # Pascal VOC's
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""A detector's label -> GenEval's name, where they differ."""

COLOURS: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


def published(label: str) -> str:
    """GenEval's name of a detector's label; other labels come back in lower case."""
    plain = label.strip().lower().replace("_", " ")
    return ELSEWHERE.get(plain, plain)
