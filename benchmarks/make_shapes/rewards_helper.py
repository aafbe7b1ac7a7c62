"""What the renderer knows, asked of the towers while they train: labels of cells, scenes, places and captions."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowbp_ray.shapes.combinations import COLOURS, SHAPES
from flowbp_ray.shapes.world import CANVAS, Claim, Scene, fact, scene_combinations

_SHAPE = {name: i for i, name in enumerate(SHAPES)}
_COLOUR = {name: i for i, name in enumerate(COLOURS)}
CELL_LABELS = len(SHAPES) + len(COLOURS)
SCENE_LABELS = len(SHAPES) * len(COLOURS) + 2 * len(SHAPES) ** 2 + 4  # coloured shapes, left / above facts, number
CLAIM_LABELS = len(SHAPES) * len(COLOURS) + 2 * len(SHAPES) ** 2 + 4 * len(SHAPES)  # the same, number by shape


class Helper(nn.Module):
    """Linear read-outs that exist during training only: what is in each cell, and what the whole scene shows.

    They hand the image tower the labels that the renderer knows anyway, so that shapes and colours need not be
    found through captions alone.
    """

    def __init__(self, width: int, projection: int, guided: bool) -> None:
        super().__init__()
        self.cell = nn.Linear(width, CELL_LABELS)
        self.scene = nn.Linear(projection, SCENE_LABELS)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-5.0))
        self.place = nn.Linear(projection, 3 * len(SHAPES)) if guided else None
        self.claim = nn.Linear(projection, CLAIM_LABELS) if guided else None

    def loss(self, cells: Tensor, embedding: Tensor, scenes: list[Scene], side: int) -> Tensor:
        """Cross-entropy of shape and colour in each cell, "nothing" weighing a fifth, and of the scene's labels.

        As 14 yes-or-no questions a cell, most of them no, the same labels taught next to nothing in the same time.
        """
        cell_truth, scene_truth = cell_labels(scenes, side), scene_labels(scenes)
        nothing = cells.new_zeros(*cells.shape[:2], 1)
        shape, colour = self.cell(cells).split([len(SHAPES), len(COLOURS)], dim=-1)
        total = cells.new_zeros(())
        for logits, truth in zip((shape, colour), cell_truth.split([len(SHAPES), len(COLOURS)], dim=-1), strict=True):
            kinds = truth.shape[-1]
            label = torch.where(truth.any(-1), truth.argmax(-1), kinds)
            weight = torch.ones(kinds + 1)
            weight[kinds] = 0.2
            choices = torch.cat([logits, nothing], dim=-1)
            total = total + F.cross_entropy(choices.flatten(0, 1), label.flatten(), weight=weight)
        total = total + 8.0 * F.binary_cross_entropy_with_logits(self.scene(embedding), scene_truth)
        if self.place is not None:
            where, known = place_labels(scenes)
            total = total + 1.5 * ((self.place(embedding) - where).pow(2) * known).sum() / known.sum()
        return total

    def text_loss(self, embedding: Tensor, claims: list[Claim]) -> Tensor:
        """Cross-entropy of what each caption states, read from its embedding [B, D].

        Meant against a text tower that is a bag of words: while "a left of b" and "b left of a" have one embedding,
        the pictures have no reason to tell them apart either. 900 steps with it were too few to cure that.
        """
        if self.claim is None:
            return embedding.new_zeros(())
        return 8.0 * F.binary_cross_entropy_with_logits(self.claim(embedding), claim_labels(claims))


def claim_labels(claims: list[Claim]) -> Tensor:
    """[B, 144]: the coloured shapes, the facts (left / above) and the number of each shape that captions state."""
    labels = np.zeros((len(claims), CLAIM_LABELS), np.float32)
    kinds = len(SHAPES) * len(COLOURS)
    for row, claim in enumerate(claims):
        for part in claim.parts:
            if part.colour is not None:
                labels[row, _SHAPE[part.shape] * len(COLOURS) + _COLOUR[part.colour]] = 1.0
            labels[row, kinds + 2 * len(SHAPES) ** 2 + 4 * _SHAPE[part.shape] + part.count - 1] = 1.0
        if claim.relation is not None:
            _, axis, first, second = fact(claim.relation, claim.parts[0].shape, claim.parts[1].shape)
            offset = kinds + (0 if axis == "left" else len(SHAPES) ** 2)
            labels[row, offset + _SHAPE[first] * len(SHAPES) + _SHAPE[second]] = 1.0
    return torch.from_numpy(labels)


def cell_labels(scenes: list[Scene], side: int) -> Tensor:
    """[B, side * side, 14]: shapes and colours of the things that cover a cell's centre or are centred in it."""
    step = CANVAS / side
    centres = (np.arange(side) + 0.5) * step
    labels = np.zeros((len(scenes), side, side, CELL_LABELS), np.float32)
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            dx, dy = np.abs(centres - thing.x)[None], np.abs(centres - thing.y)[:, None]
            mine = (np.hypot(dx, dy) < 0.8 * thing.size) | ((dx <= step / 2) & (dy <= step / 2))
            labels[row, mine, _SHAPE[thing.shape]] = 1.0
            labels[row, mine, len(SHAPES) + _COLOUR[thing.colour]] = 1.0
    return torch.from_numpy(labels).flatten(1, 2)


def scene_labels(scenes: list[Scene]) -> Tensor:
    """[B, 124]: which coloured shapes are there, which is left of or above which, and how many things."""
    labels = np.zeros((len(scenes), SCENE_LABELS), np.float32)
    kinds = len(SHAPES) * len(COLOURS)
    for row, scene in enumerate(scenes):
        for key in scene_combinations(scene):
            if key[0] == "colour":
                labels[row, _SHAPE[key[1]] * len(COLOURS) + _COLOUR[key[2]]] = 1.0
            elif key[0] == "fact":
                axis = 0 if key[1] == "left" else len(SHAPES) ** 2
                labels[row, kinds + axis + _SHAPE[key[2]] * len(SHAPES) + _SHAPE[key[3]]] = 1.0
        labels[row, SCENE_LABELS - 4 + min(len(scene.things), 4) - 1] = 1.0
    return torch.from_numpy(labels)


def place_labels(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """[B, 18] twice: mean x, mean y and number of each shape, and which of them are defined.

    "a left of b" is a difference of two coordinates, which a cosine could read off.
    """
    labels, known = np.zeros((2, len(scenes), 3, len(SHAPES)), np.float32)
    known[:, 2] = 1.0
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            column = _SHAPE[thing.shape]
            labels[row, :, column] += (thing.x / 16 - 2, thing.y / 16 - 2, 1.0)
            known[row, :, column] = 1.0
    labels[:, :2] /= np.maximum(labels[:, 2:], 1.0)
    return torch.from_numpy(labels).flatten(1), torch.from_numpy(known).flatten(1)
