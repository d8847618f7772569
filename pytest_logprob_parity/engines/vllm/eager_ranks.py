"""Runs in vLLM's worker: ranks are counted by vLLM's own function without torch.compile, where the engine is eager.

vLLM (0.32) compiles one function even under `enforce_eager`: it counts how many logprobs of a row are at least the chosen one.
On a CPU a new process spends 2 to 8 s on that, more than on all else of a short check. The count is an integer: equal bits.
"""

from __future__ import annotations

import sys
from typing import Any, Final

_COUNT: Final = "batched_count_greater_than"
#: Where vLLM has the function, or has imported it by name.
_MODULES: Final = ("vllm.v1.sample.ops.logprobs", "vllm.v1.sample.sampler")


def count_ranks_eagerly(worker: Any) -> bool:
    """Take the compiled wrapper off, in this process; whether it was there. Other devices and compiled engines keep it."""
    config = getattr(worker, "vllm_config", None)
    eager = getattr(getattr(config, "model_config", None), "enforce_eager", False)
    device = getattr(getattr(config, "device_config", None), "device_type", None)
    if not eager or device != "cpu":
        return False
    found = False
    for name in _MODULES:
        module = sys.modules.get(name)
        bare = getattr(getattr(module, _COUNT, None), "_torchdynamo_orig_callable", None)
        if bare is not None:
            setattr(module, _COUNT, bare)
            found = True
    return found
