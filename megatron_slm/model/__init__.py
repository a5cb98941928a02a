"""The decoder's mathematics, free of ranks, process groups and schedules."""
