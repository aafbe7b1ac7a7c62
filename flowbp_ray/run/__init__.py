"""A run's folder: its files, its checkpoints, its sheets of pictures."""
