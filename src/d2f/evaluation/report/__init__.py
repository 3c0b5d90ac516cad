"""`d2f report`: tables and figures from result files."""
