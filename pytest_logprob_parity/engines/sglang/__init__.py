"""A running SGLang server as an engine: it scores given tokens in a prefill."""
