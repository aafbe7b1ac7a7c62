"""What held-out pictures are worth: means with intervals, and the evaluations in a run's course."""
