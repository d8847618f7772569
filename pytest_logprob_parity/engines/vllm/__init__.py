"""vLLM in this process: start it, read its configuration back, force its sampler, update its weights."""
