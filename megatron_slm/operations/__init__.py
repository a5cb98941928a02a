"""What watches, stops and restarts runs."""
