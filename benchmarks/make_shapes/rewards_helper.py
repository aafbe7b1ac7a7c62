"""What the renderer knows, asked of the towers while they train: labels of cells, factors of scenes and captions."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowbp_ray.shapes.combinations import COLOURS, SHAPES, is_held_out
from flowbp_ray.shapes.world import CANVAS, Claim, Scene

_SHAPE = {name: i for i, name in enumerate(SHAPES)}
_COLOUR = {name: i for i, name in enumerate(COLOURS)}
CELL_LABELS = len(SHAPES) + len(COLOURS)
MOST = 4  # things of one shape
PLACES = 2 * len(SHAPES)  # x, then y of each shape
FACTORS = PLACES + MOST * len(SHAPES) + len(COLOURS) * len(SHAPES)  # places, number by shape, colours by shape


class Helper(nn.Module):
    """Linear read-outs that exist during training only: what is in each cell, and the factors of picture and caption.

    One read-out serves pictures and captions. Where "a left of b" reads x_a = -1, x_b = +1 and a picture reads the
    coordinates, their inner product is x_b - x_a: a cosine can hold the relation, also of two shapes that were never
    seen in it. Questions about whole facts ("a left of b": yes or no) taught neither tower that.
    """

    def __init__(self, width: int, projection: int) -> None:
        super().__init__()
        self.cell = nn.Linear(width, CELL_LABELS)
        self.factors = nn.Linear(projection, FACTORS)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-5.0))

    def loss(self, cells: Tensor, embedding: Tensor, scenes: list[Scene], side: int) -> Tensor:
        """Cross-entropy of shape and colour in each cell, "nothing" weighing a fifth, and the scene's factors.

        As 14 yes-or-no questions a cell, most of them no, the same labels taught next to nothing in the same time.
        """
        cell_truth = cell_labels(scenes, side)
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
        return total + self._factor_loss(embedding, *scene_factors(scenes))

    def text_loss(self, embedding: Tensor, claims: list[Claim]) -> Tensor:
        """How well the factors of what each caption states are read from its embedding [B, D].

        Against a text tower that is a bag of words: while "a left of b" and "b left of a" have one embedding, the
        pictures have no reason to tell them apart either.
        """
        return self._factor_loss(embedding, *claim_factors(claims))

    def _factor_loss(self, embedding: Tensor, truth: Tensor, known: Tensor) -> Tensor:
        """Squared error of the places and binary cross-entropy of the rest, over what is known."""
        read = self.factors(embedding)
        apart = (read - truth)[:, :PLACES].square() * known[:, :PLACES]
        doubt = F.binary_cross_entropy_with_logits(read[:, PLACES:], truth[:, PLACES:], reduction="none")
        doubt = doubt * known[:, PLACES:]
        return 1.5 * apart.sum() / known[:, :PLACES].sum() + 8.0 * doubt.sum() / known[:, PLACES:].sum()


def _blank(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Truth (all zero) and what is known of it: nobody may learn that a held-out colour of a shape never occurs."""
    truth, known = np.zeros((2, rows, FACTORS), np.float32)
    known[:, PLACES:] = 1.0
    for shape in SHAPES:
        for colour in COLOURS:
            if is_held_out(("colour", shape, colour)):
                known[:, _colour_column(shape, colour)] = 0.0
    return truth, known


def _number_column(shape: str, count: int) -> int:
    return PLACES + MOST * _SHAPE[shape] + min(count, MOST) - 1


def _colour_column(shape: str, colour: str) -> int:
    return PLACES + MOST * len(SHAPES) + len(COLOURS) * _SHAPE[shape] + _COLOUR[colour]


def claim_factors(claims: list[Claim]) -> tuple[Tensor, Tensor]:
    """Truth and known, [B, 84] each: the side of a relation that a shape is on, numbers and colours by shape."""
    truth, known = _blank(len(claims))
    known[:, :PLACES] = 1.0
    for row, claim in enumerate(claims):
        for part in claim.parts:
            truth[row, _number_column(part.shape, part.count)] = 1.0
            if part.colour is not None:
                truth[row, _colour_column(part.shape, part.colour)] = 1.0
        if claim.relation is not None:
            axis = 0 if claim.relation in ("left of", "right of") else len(SHAPES)
            side = -1.0 if claim.relation in ("left of", "above") else 1.0
            truth[row, axis + _SHAPE[claim.parts[0].shape]] = side
            truth[row, axis + _SHAPE[claim.parts[1].shape]] = -side
    return torch.from_numpy(truth), torch.from_numpy(known)


def scene_factors(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Truth and known, [B, 84] each: mean x and y (-2..2) of each shape that is there, numbers and colours by shape."""
    truth, known = _blank(len(scenes))
    for row, scene in enumerate(scenes):
        for shape in {thing.shape for thing in scene.things}:
            mine = [thing for thing in scene.things if thing.shape == shape]
            for axis, centre in enumerate((np.mean([t.x for t in mine]), np.mean([t.y for t in mine]))):
                truth[row, axis * len(SHAPES) + _SHAPE[shape]] = centre / 16 - 2
                known[row, axis * len(SHAPES) + _SHAPE[shape]] = 1.0
            truth[row, _number_column(shape, len(mine))] = 1.0
            for thing in mine:
                truth[row, _colour_column(shape, thing.colour)] = 1.0
    return torch.from_numpy(truth), torch.from_numpy(known)


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
