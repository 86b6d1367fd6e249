"""Inference code of a converted model: flat, and free of everything else in the package."""
