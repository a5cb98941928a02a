"""Predicts memory, step time and the best layout of a run from its configuration alone."""
