"""Where configurations name the worker extension: it lives in `engines.vllm.forced_decode`."""

from .vllm.forced_decode import WorkerExtension

__all__ = ["WorkerExtension"]
