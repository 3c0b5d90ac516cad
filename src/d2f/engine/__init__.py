"""The engine: it owns the loop; requests go in, responses come out."""
