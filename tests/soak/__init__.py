"""A long run whose actors are killed again and again: what of memory, files, threads and the like grows."""
