"""In which precision a started vLLM's head really computes: as its layer says, and as its logits show."""

from __future__ import annotations

from typing import Any, Final

from ...lm_head_precision import grid_of

#: Tokens of a probe: one logit gap each, enough to tell a grid by.
PROBE: Final = 96


def applied_head(worker: Any) -> str | None:
    """Runs in vLLM's worker: the dtype that its logits processor casts to; None where this version has none."""
    model = getattr(getattr(worker, "model_runner", None), "model", None)
    for module in () if model is None else model.modules():
        if type(module).__name__ == "LogitsProcessor" and hasattr(module, "head_dtype"):
            return str(module.head_dtype).removeprefix("torch.")
    return None


def probe_tokens(vocabulary: int, context: int | None) -> list[int]:
    """Token ids that mean nothing, as many as a probe takes or the context holds."""
    return [7 * n % vocabulary for n in range(min(PROBE, (context or PROBE) - 1))]


def measured_grid(top_logprobs: Any) -> float | None:
    """The grid (its step) that the logits behind raw top-2 logprobs [N, 2] lie on: 0 for none, None where too few tell."""
    return grid_of(top_logprobs[:, 0].astype("float64") - top_logprobs[:, 1].astype("float64"))
