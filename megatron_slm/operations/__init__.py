"""Watches, stops and restarts runs, and checks machines before one."""
