"""Where things lie, for tests."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The repository."""
DATA = ROOT / "tests" / "data"
