"""Text to corpora."""
