"""Pipeline schedules as pure data."""
