"""Selection of the tokens to train on: pure functions of tensors."""
