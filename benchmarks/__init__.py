"""Scripts that measure the library or make its package data."""
