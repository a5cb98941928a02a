"""Which tokens are kept: pure functions of tensors."""
