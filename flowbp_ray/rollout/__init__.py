"""Rollouts without gradient: the items of a step, their execution, and the sampler that holds the weights."""
