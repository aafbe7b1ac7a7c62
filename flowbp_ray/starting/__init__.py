"""The first five minutes: what this machine has, and a configuration to begin with."""
