"""Measuring: scores on problems, and strategies side by side. Knows the engine only."""
