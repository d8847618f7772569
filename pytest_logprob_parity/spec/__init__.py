"""What to run and how to sample: engine specs, sampling, profiles, and where their settings come from. No engine, no file."""

from .engine_spec import DTYPES, Dtype, EngineSpec
from .profiles import PROFILES, RL_ON_CPU
from .sampling import Sampling

__all__ = ["DTYPES", "PROFILES", "RL_ON_CPU", "Dtype", "EngineSpec", "Sampling"]
