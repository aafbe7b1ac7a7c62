"""Rollouts without gradient: the items of a step, how one is done, and the sampler that holds the weights."""
