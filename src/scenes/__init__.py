"""Captioned pictures that the project draws itself: what its own model learns from, and what it is examined in."""
