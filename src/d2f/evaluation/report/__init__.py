"""`d2f report`: result files in, tables, figures and the paper's claims out."""
