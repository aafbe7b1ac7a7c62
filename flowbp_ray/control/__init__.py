"""What decides the course of a run: which samples count, when a reward is hacked, how many processes there are."""
