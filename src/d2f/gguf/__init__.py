"""GGUF files: llama.cpp's format, with a model's metadata, tokenizer and weights in one file.

The package turns a GGUF into a folder with the small files that the hub would hold for the model,
and gives the tensors the hub's names; they are read from the GGUF one by one. Nothing outside of
this package knows more of the format.
"""

NO_TOKENIZER = "no_tokenizer.txt"
"""Name of a file in the folder of a GGUF which says why the folder holds no tokenizer."""
