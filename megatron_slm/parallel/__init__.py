"""Topology, process groups, collectives and tensor-parallel layers."""
