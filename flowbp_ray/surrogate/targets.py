"""The axis `target`: the latent that the reward sees."""

from __future__ import annotations

from typing import Literal

from .plan import axis


@axis
class LatePosterior:
    """The posterior mean at a node drawn uniformly from the last `last` ones (ReFL, arXiv 2304.05977)."""

    last: int = 11
    kind: Literal["late_posterior"] = "late_posterior"

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ValueError(f"last must be at least 1, got {self.last}")


@axis
class EarlyStop:
    """The posterior mean at e = N − r, r uniform in 1…round(ratio·N) (DRTune, arXiv 2405.00760)."""

    ratio: float = 0.4
    kind: Literal["early_stop"] = "early_stop"

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], got {self.ratio}")


@axis
class WithRenoised:
    """The last posterior mean, and one at y = (1−s)·x[N] + s·ε for each of n fresh ε (DRaFT-LV, arXiv 2309.17400)."""

    n: int = 2
    kind: Literal["renoised"] = "renoised"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1 (or write target: {{kind: sample}}), got {self.n}")
