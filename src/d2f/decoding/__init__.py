"""Decoding strategies: the pipeline, its oracle, and the methods it is compared with."""
