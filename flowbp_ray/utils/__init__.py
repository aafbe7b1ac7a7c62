"""Small things that know nothing of training: errors, files, digests, random streams, tracing, signals."""
