"""Throughput at a ratio of samplers to learners: measured, emulated, in closed form and simulated. Imports no Ray."""
