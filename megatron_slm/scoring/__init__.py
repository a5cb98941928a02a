"""The offline pass that stores a reference's losses."""
