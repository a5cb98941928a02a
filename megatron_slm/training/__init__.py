"""The training run: build, step, loop, evaluation, records, replay."""
