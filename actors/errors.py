"""Classification of Ray's errors."""

from __future__ import annotations

from typing import Any, TypeAlias

import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from flowbp_ray.utils.errors import RunFailed

Ref: TypeAlias = "ray.ObjectRef[Any]"
"""A reference to the result of a call, which is in Ray's object store or still to come."""


class LearnersLost(RunFailed):
    """A rank died or does not answer. The ranks' state since the last checkpoint is lost."""


class WeightsMissing(RuntimeError):
    """A sampler was to hold a version that it received by broadcast, and does not, or no longer."""


class EmbeddingsLost(RuntimeError):
    """A sampler could not fetch a part of the embeddings: the node that held it, or the object, is gone."""


class NotCached(RuntimeError):
    """A prompt was to be read from the cache on disk, and is not there, or its file is broken."""


def lacks_embeddings(error: Exception) -> bool:
    """Whether a call failed because the sampler could not fetch the embeddings that it was given references to."""
    return isinstance(error, RayTaskError) and isinstance(error.cause, EmbeddingsLost)


def is_not_cached(error: Exception) -> bool:
    """Whether a prompt was not in the cache from which it was to be read."""
    return isinstance(error, RayTaskError) and isinstance(error.cause, NotCached)


def lacks_weights(error: Exception) -> bool:
    """Whether a call failed because the sampler lacks the version and was given no references to it."""
    return isinstance(error, RayTaskError) and isinstance(error.cause, WeightsMissing)


def object_lost(error: Exception) -> bool:
    """Whether a call failed because an object that it needs is gone, with the node that held it."""
    found = error.cause if isinstance(error, RayTaskError) else error
    return isinstance(found, ObjectLostError)


def is_permanent(error: Exception) -> bool:
    """Whether a retry would fail again: the actor's code raised ValueError, a mistake that the user must correct."""
    return isinstance(error, RayTaskError) and isinstance(error.cause, ValueError)


def arguments_arrived(error: Exception) -> bool:
    """Whether a call failed in the actor's own code, so that its arguments had arrived and can be used for a retry.

    If an argument was lost with the node that held it, Ray raises one of its own errors inside the task.
    """
    return isinstance(error, RayTaskError) and not isinstance(error.cause, RayError)


def cause(error: Exception) -> str:
    """The last line of an error's message that is not empty, without Ray's remote traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
