"""The same operations as Triton kernels; importing this package imports Triton."""
