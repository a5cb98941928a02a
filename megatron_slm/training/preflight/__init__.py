"""Preflight: are the machines of a run alike, can they reach each other, and how fast."""
