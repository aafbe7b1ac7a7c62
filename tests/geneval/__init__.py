"""GenEval: prompts, verdicts, detectors, colours and the metric."""
