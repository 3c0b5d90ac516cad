"""What block diffusion is: layouts, visibility, mask ratios, corruption, decoding thresholds."""
