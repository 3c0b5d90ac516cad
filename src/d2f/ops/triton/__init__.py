"""Triton kernels; each has a twin in plain torch, in the module of the same name above."""
