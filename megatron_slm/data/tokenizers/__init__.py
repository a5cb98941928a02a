"""Tokenizers under Megatron's type names."""
