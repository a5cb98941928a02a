"""The decoder's mathematics: no ranks, no process groups, no schedules."""
