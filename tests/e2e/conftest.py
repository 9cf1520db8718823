"""Lets the end-to-end tests import what they share (`promise.py`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
