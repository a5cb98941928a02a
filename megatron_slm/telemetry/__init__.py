"""Metrics, logs, monitors, profiles and utilization of a run."""
