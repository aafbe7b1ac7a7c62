"""Faults that are injected into real runs, and what becomes of them: `python -m tests.chaos`."""
