"""Block diffusion as tensor functions: layout, visibility, mask ratios, corruption, policy."""
