"""The penalty on the distance to the base model's velocities, as a cotangent.

    P = weight · Σ_b factor[b] / B · 1/K_b · Σ_i mean over elements of (v_theta(x[i]) − v_base(x[i]))²

b runs over the global batch of B rows and i over the K_b active states of row b. A state counts once, however many
terms of the plan evaluate it. factor[b] multiplies the row's reward cotangent: 0 for a masked row, B / kept for the
others, so that P is a mean over the kept rows. The states x[i] are the cached ones, held fixed: only v_theta(x[i]) has
a gradient. v is the velocity that a learner differentiates (g·v_cond with a detached negative branch), compared in
fp32; v_base is what it is held to (`flowbp_ray.backbones.guidance.held_velocity`). The similarity weight omega belongs
to the reward and does not enter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cache import append_dims, places
from .plan import Plan


def base_penalty(plans: Sequence[Plan], base: Tensor, shares: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the `penalty` argument of `sweep`: a function that computes dP/dv at given states.

    base: v_base at the states [R, ...], sample-major. shares: weight · factor / B of each plan's row [rows], times the
    engine's `scale`.
    """
    each = torch.stack([shares[b] / len(plans[b].states) for b, _ in places(plans)])

    def cotangent(position: Tensor, v: Tensor) -> Tensor:
        """dP/dv [r, ...] in fp32 (fp64 for fp64 velocities) for v [r, ...] at the states `position` [r] int64.

        With base, shares and v on a GPU and `position` on the host it is not waited for.
        """
        dtype = torch.promote_types(v.dtype, torch.float32)
        theirs, share = (t[position.to(t.device, non_blocking=True)].to(v.device, dtype) for t in (base, each))
        away = v.to(dtype) - theirs
        slope = 2.0 * share / away[0].numel()
        return append_dims(slope, v.dim()) * away

    return cotangent
