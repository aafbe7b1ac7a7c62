"""GenEval (Ghosh, Hajishirzi, Schmidt 2023, arXiv 2310.11513): does the picture show what the prompt lists, yes or no.

`prompts` reads its file format, `verdict` decides on what a detector found, `detect` and `owl` find, `colours` names
colours. The published evaluator is github.com/djghosh13/geneval (evaluation/evaluate_images.py); this one is written
against transformers instead of mmdet and open_clip. `flowbp_ray.rewards.geneval.metric` is the metric made of it.
"""

from flowbp_ray.rewards.geneval.prompts import Task, load
from flowbp_ray.rewards.geneval.verdict import Detection, GenEvalVerdict, Thresholds, keep, relations, verdict

__all__ = ["Detection", "GenEvalVerdict", "Task", "Thresholds", "keep", "load", "relations", "verdict"]
