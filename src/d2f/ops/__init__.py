"""Tensor operations of the transformer core, in plain torch."""
