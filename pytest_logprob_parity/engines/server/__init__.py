"""A vLLM behind its OpenAI-compatible server: the client that asks it, and what `logprob-parity serve` adds to it."""
