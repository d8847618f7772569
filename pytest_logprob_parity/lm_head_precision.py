"""The grid that logits lie on: a head in half precision leaves them there, one in float32 does not."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

#: Grids from 8 down to 1/256: bfloat16 logits of 8 to 16 lie on one of 1/16, e4m3 ones on one of 1.
_STEPS: Final = tuple(2.0**-n for n in range(-3, 9))
#: A difference is on the grid when it is so near to it (nats): float32 logprobs round at this size.
_NEAR: Final = 3e-5
_MOST: Final = 0.9
#: Fewer gaps than this tell nothing.
ENOUGH: Final = 50


def grid_of(gaps: npt.NDArray[np.float64]) -> float | None:
    """The grid that gaps [N] between logits (nats) lie on: its step, 0 for none, or None where too few tell."""
    gaps = gaps[gaps > 4 * _NEAR]
    if len(gaps) < ENOUGH:
        return None
    for step in _STEPS:
        if np.mean(np.abs(gaps - np.round(gaps / step) * step) <= _NEAR) >= _MOST:
            return step
    return 0.0
