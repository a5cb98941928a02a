"""What a run will need and how long it will take, from its configuration alone: memory, step time, layouts."""
