"""Python interface for training loops of one's own, the Hugging Face Trainer, and whole runs."""
