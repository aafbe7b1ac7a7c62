"""One optimizer step from cached states and cotangents: the learner, its engines, the optimizer."""
