"""llama.cpp as an engine: an implementation that shares no code with vLLM, torch or transformers."""
