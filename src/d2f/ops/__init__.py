"""Tensor operations of a forward, in plain torch and as Triton kernels."""
