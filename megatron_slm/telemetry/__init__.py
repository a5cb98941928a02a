"""Metrics, histories, monitors, timers of resources."""
