"""Suites of runs beside each other: methods, settings and seeds in one table."""
