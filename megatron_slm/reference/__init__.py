"""The frozen reference model."""
