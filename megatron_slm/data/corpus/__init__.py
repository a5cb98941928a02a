"""Corpora on disk: Megatron's .bin/.idx format, sidecars, merging, inspection."""
