"""Checks that the machines are ready for a run."""
