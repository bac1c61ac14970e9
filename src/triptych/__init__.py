"""Triptych: mPLUG, BridgeTower and EVE in one library."""

__version__ = "0.1.0"
