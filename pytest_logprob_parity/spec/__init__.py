"""What to run and how to sample: engine specs, sampling, profiles, and where their settings come from. No engine, no file."""

from .engine_spec import DTYPES, PROFILES, RL_ON_CPU, EngineSpec, Sampling, nearest

__all__ = ["DTYPES", "PROFILES", "RL_ON_CPU", "EngineSpec", "Sampling", "nearest"]
