"""Decisions during a run: which samples count, whether a reward is hacked, how many processes there are."""
