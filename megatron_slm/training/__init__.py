"""The training run: what builds it, one step, the loop, and what a run writes."""
