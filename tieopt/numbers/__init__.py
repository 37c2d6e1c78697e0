"""The numbers: pure functions of tensors."""
