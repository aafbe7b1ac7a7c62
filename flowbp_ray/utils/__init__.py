"""Utilities that do not depend on training: errors, files, digests, random streams, tracing, signals."""
