"""What the detector learns from: each cell says what the exact verifier reads there, moved and mirrored too."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.make_shapes.detector_data import MOST, Pictures, batch, read_all, targets
from flowbp_ray.rewards.shapes_maps import CELL, JUNK, KINDS, NOTHING, SIDE
from flowbp_ray.shapes import render, sample
from flowbp_ray.shapes.combinations import COLOURS
from flowbp_ray.shapes.world import SIZE_BOUNDARY, Scene


def expected(scene: Scene) -> dict[int, tuple[int, int, bool]]:
    """Cell -> kind, colour and whether it is large, of a scene."""
    return {
        int(t.y // CELL) * SIDE + int(t.x // CELL): (
            KINDS.index(t.shape),
            list(COLOURS).index(t.colour),
            t.size > SIZE_BOUNDARY,
        )
        for t in scene.things
    }


def test_cells_say_what_is_drawn() -> None:
    rng = np.random.default_rng(0)
    scenes = [s for s in (sample(rng, "train")[0] for _ in range(40)) if _off_the_lines(s)]
    some = read_all(np.stack([render(scene) for scene in scenes]))
    found = targets(some.things)
    for row, scene in enumerate(scenes):
        wanted = expected(scene)
        assert {int(c) for c in (found.kinds[row] != NOTHING).nonzero()} == set(wanted)
        for cell, (kind, colour, large) in wanted.items():
            assert found.kinds[row, cell] == kind and found.near[row, cell]
            assert found.colours[row, cell] == colour and bool(found.large[row, cell]) == large
            nearest = min(abs(found.places[row, cell].numpy() - (t.x, t.y)).max() for t in scene.things)
            assert nearest < 0.5
    assert len(scenes) > 10


def _off_the_lines(scene: Scene) -> bool:
    """Whether no centre is where reading it half a pixel off would change its cell, and no radius near the boundary."""
    centres = np.array([(t.x, t.y) for t in scene.things]) % CELL
    sizes = np.array([t.size for t in scene.things])
    return bool((centres > 0.5).all() and (centres < CELL - 0.5).all() and (abs(sizes - SIZE_BOUNDARY) > 0.5).all())


def test_two_things_in_a_cell_are_junk() -> None:
    things = np.zeros((1, MOST, 5), np.float32)
    things[0, :2] = [[10, 10, 1, 0, 0], [12, 12, 2, 3, 1]]
    found = targets(things)
    assert found.kinds[0, SIDE + 1] == JUNK and (found.kinds[0] != NOTHING).sum() == 1


def test_labels_move_with_the_picture() -> None:
    """A white pixel in a black picture is where its label says, however the batch mirrored and moved it."""
    images, things = np.zeros((1, 64, 64, 3), np.uint8), np.zeros((1, MOST, 5), np.float32)
    images[0, 20:23, 40:43] = 255
    things[0, 0] = [41.5, 21.5, 1, 0, 0]
    pictures, found = batch(np.random.default_rng(1), Pictures(images, things), 32)
    for image, kinds, near, places in zip(pictures, found.kinds, found.near, found.places, strict=True):
        weight = (image.mean(0) - image.mean(0).median()).clamp(min=0.3) - 0.3
        line = torch.arange(64) + 0.5
        x, y = (weight.sum(0) * line).sum() / weight.sum(), (weight.sum(1) * line).sum() / weight.sum()
        cell = int((kinds != NOTHING).nonzero()[0])
        assert near[cell] and (places[cell] - torch.stack([x, y])).abs().max() < 0.6
