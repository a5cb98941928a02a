"""The plan of a run, made before any process group exists."""
