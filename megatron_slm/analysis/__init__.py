"""Analysis of runs and models: run reports, kept tokens, token dynamics, evaluation."""
