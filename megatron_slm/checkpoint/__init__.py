"""Checkpoints by logical tensor: written once by whoever owns a piece, read at any layout."""
