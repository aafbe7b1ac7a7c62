"""Did a step change the weights, and if not, why?"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import StepReport
from flowbp_ray.utils.errors import RunFailed


def changed(
    config: RunConfig, step: int, learners: Sequence[StepReport], prompts: Sequence[str], log: logging.Logger
) -> bool:
    """Whether the learners updated; a gradient norm that is not finite updated nothing, and the log names why.

    learners: empty where no sample was kept. Raises RunFailed for a bad gradient with `nonfinite: stop`.
    """
    updated = bool(learners) and math.isfinite(learners[0].grad_norm)
    faults = [fault.describe(prompts) for report in learners for fault in report.faults]
    for fault in faults:
        log.warning("%s", fault)
    if learners and not updated and config.nonfinite == "stop":
        why = faults[0] if faults else f"gradient of step {step} is not finite"
        raise RunFailed(f"{why}; nonfinite=skip_step would go on without the step")
    if not updated:
        log.warning("step %d changed nothing: %s", step, "bad gradient" if learners else "no sample was kept")
    return updated
