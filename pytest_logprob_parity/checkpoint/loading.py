"""Transformers models from checkpoint folders, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import EngineError
from ..reasons import reason_of


def load_whole(folder: Path, name: str, **how: Any) -> Any:
    """The causal model in `folder`; `name` is what messages call it, `how` goes to `from_pretrained`. Nothing is fetched.

    Raises EngineError where it does not load, and where the checkpoint lacks tensors: transformers makes those up.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, told = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, output_loading_info=True, **how)
    except Exception as error:
        raise EngineError(f"transformers did not load {name}: {reason_of(error)}") from error
    if missing := sorted(told["missing_keys"]):
        raise EngineError(
            f"{name} lacks {len(missing)} tensors, {missing[0]!r} first: half-written, or of another architecture; "
            "transformers would fill them with random numbers"
        )
    return model
