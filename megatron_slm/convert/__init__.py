"""Import from and export to Hugging Face folders, and the proof that both sides compute the same losses."""
