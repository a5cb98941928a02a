"""Tokenizes text into corpora, in parallel and resumably."""
