"""Evaluation of finished models: perplexity of named sets, and few-shot questions whose answers are checked."""
