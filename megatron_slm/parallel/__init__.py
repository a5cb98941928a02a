"""Ranks, groups, conjugate collectives and the tensor-parallel layers."""
