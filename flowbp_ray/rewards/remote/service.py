"""A reward server without HTTP: the body of a request is checked and scored, and the body of the answer returned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Packed
from flowbp_ray.rewards.remote import codec
from flowbp_ray.rewards.remote.codec import WireError
from flowbp_ray.rewards.remote.identity import digest, identity
from flowbp_ray.rewards.remote.limits import ServerLimits, latent_shape
from flowbp_ray.rewards.remote.wire import EvaluateAnswer, EvaluateRequest, ScoreAnswer, ScoreRequest
from flowbp_ray.rewards.scorer import Scorer

DTYPES = ("float32", "bfloat16", "float16")


class RequestRefused(Exception):
    """A request that is answered with an HTTP status in the 400s. The text is one line for whoever sent it."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Service:
    """One `Scorer` behind bodies of bytes. Not for two threads at once."""

    def __init__(self, config: RunConfig, limits: ServerLimits) -> None:
        self.config, self.limits = config, limits
        self.shape, self.branches = latent_shape(config), config.surrogate().branches
        self.identity = identity(config)
        self.digest = digest(self.identity)
        self.scorer = Scorer(config.backbone, config.rewards, config.data.shape.batch)

    def about(self) -> dict[str, Any]:
        """What /health answers a client that has the token."""
        stated = {"identity": self.identity, "digest": self.digest}
        return stated | {"max_rows": self.limits.rows, "max_bytes": self.limits.nbytes}

    def score(self, body: bytes) -> bytes:
        """The answer to POST /score. Raises `RequestRefused` for what is no training item of this configuration."""
        request = _parse(ScoreRequest, body)
        self._check_rows(request)
        self._check_values(request.target, "target", (len(request.samples), self.branches, *self.shape))
        rows = len(request.samples)
        if request.omega.shape != (rows,) or request.omega.dtype != np.float64 or not np.isfinite(request.omega).all():
            raise RequestRefused(422, f"omega must be [{rows}] finite float64")
        if request.kept.shape != (rows,) or request.kept.dtype != bool:
            raise RequestRefused(422, f"kept must be [{rows}] bool")
        batch = self.config.data.shape.batch
        if request.batch != batch:
            raise RequestRefused(
                422, f"the global batch is {request.batch} there and {batch} here; start both with one config"
            )
        if rows > batch:
            raise RequestRefused(422, f"{rows} rows are more than the global batch of {batch}")
        try:
            scored, cotangent = self.scorer.score(request.item(), request.prompts, request.report(), request.target)
        except ValueError as error:
            raise RequestRefused(422, _line(error)) from error
        return codec.dump(ScoreAnswer(scored, cotangent))

    def evaluate(self, body: bytes) -> bytes:
        """The answer to POST /evaluate. Raises `RequestRefused` for what is no finished item of this configuration."""
        request = _parse(EvaluateRequest, body)
        self._check_rows(request)
        self._check_values(request.latents, "latents", (len(request.samples), *self.shape))
        try:
            return codec.dump(EvaluateAnswer(self.scorer.evaluate(request.item(), request.prompts, request.latents)))
        except ValueError as error:
            raise RequestRefused(422, _line(error)) from error

    def _check_rows(self, request: ScoreRequest | EvaluateRequest) -> None:
        """As many rows of everything, no more than are allowed, and no negative key of a random stream."""
        rows = len(request.samples)
        if not 1 <= rows <= self.limits.rows:
            raise RequestRefused(422, f"a request has 1 to {self.limits.rows} rows, got {rows}; see --max-rows")
        for name in ("prompt_ids", "prompts"):
            if len(getattr(request, name)) != rows:
                raise RequestRefused(422, f"{rows} samples need {rows} {name}, got {len(getattr(request, name))}")
        if min(request.seed, request.step, request.index, *request.samples, *request.prompt_ids) < 0:
            raise RequestRefused(422, "seed, step, index, samples and prompt_ids must not be negative")

    def _check_values(self, packed: Packed, name: str, shape: Sequence[int]) -> None:
        """Shape and dtype of an array. Its values may be anything: the scorer names bad rows."""
        if packed.array.shape != tuple(shape):
            raise RequestRefused(422, f"{name} must be {list(shape)}, got {list(packed.array.shape)}")
        if packed.dtype not in DTYPES:
            raise RequestRefused(422, f"{name} must be one of {', '.join(DTYPES)}, got {packed.dtype}")


def _parse(kind: type[codec.Message], body: bytes) -> codec.Message:
    try:
        return codec.parse(kind, body)
    except WireError as error:
        raise RequestRefused(400, str(error)) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
