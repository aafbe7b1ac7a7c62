"""A run's folder: its files, its checkpoints and its sheets of pictures."""
