"""Tests that need a GPU; the name of the package keeps their files apart from those one folder up."""
