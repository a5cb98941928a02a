"""Corpora on disk."""
