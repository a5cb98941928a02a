"""What a run will be, before a process group exists."""
