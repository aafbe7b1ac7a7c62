"""Evaluations on held-out prompts: when a run makes them, and means with intervals of what they measure."""
