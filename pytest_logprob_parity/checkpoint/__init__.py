"""Models on disk: digests, prompts and tokenizer, adapters, weight updates, the LM head, loading."""
