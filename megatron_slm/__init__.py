"""Selective Language Modeling at scale: train on the tokens worth learning."""

__version__ = "0.1.0"
