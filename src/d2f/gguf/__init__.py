"""GGUF files: one file with a model's metadata, tokenizer and weights, as llama.cpp reads it.

A GGUF becomes what the hub would hold: the same small files, in a folder of their own, and tensors
by the hub's names, which are read from the GGUF one by one. Nothing outside of this package needs
to know more of the format.
"""

NO_TOKENIZER = "no_tokenizer.txt"
"""In the folder of a GGUF, a file that says why there is no tokenizer."""
