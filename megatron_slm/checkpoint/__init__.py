"""Checkpoints by logical tensor: every rank saves the slices it owns; any layout loads them."""
