"""Hugging Face folders in and out; the same weights must give the same losses on both sides."""
