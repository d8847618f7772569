"""transformers as an engine: the reference implementation."""
