"""Evaluation of finished models: perplexity of named sets, and accuracy on few-shot questions."""
