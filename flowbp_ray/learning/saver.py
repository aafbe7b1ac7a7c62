"""A rank's part of a checkpoint is written by a thread, from a copy, while the rank goes on."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

from flowbp_ray.learning.engine import Engine
from flowbp_ray.run.engine_state import bytes_of, copied
from flowbp_ray.utils.background import done, free_memory, started

RANKS = 8  # that a node may have; each of them copies its part
ROOM = 1.25  # of what the copies take, that must be free


class StateSaver:
    """Saves the state of one rank's engine, one checkpoint at a time."""

    def __init__(self, engine: Engine, ranks: int) -> None:
        """ranks: of the group."""
        self.engine, self.ranks = engine, ranks
        self.saving: Future[dict[str, str]] | None = None

    def begin(self, folder: Path, background: bool) -> None:
        """Begin to write the state as it is now below a checkpoint's folder; `saved` has the result.

        background: copy it into host memory, and let a thread write the copy. Where the host's memory has no room for
        the copies of all ranks that it may have, it is written at once instead, as without `background`. That raises
        NoSpace where the disk is full.
        """
        own = self.engine.fragments()
        if background and free_memory() > ROOM * min(self.ranks, RANKS) * bytes_of(own):
            still = copied(own)
            self.saving = started(lambda: self.engine.save(folder, still))
        else:
            self.saving = done(lambda: self.engine.save(folder, own))

    def saved(self, wait: bool) -> dict[str, str] | None:
        """The sha256 of the written files by name; None while they are being written, unless that is waited for.

        Raises what writing them raised, such as NoSpace.
        """
        assert self.saving is not None, "nothing is being saved"
        return self.saving.result() if wait or self.saving.done() else None
