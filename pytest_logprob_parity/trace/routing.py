"""The columns of a mixture of experts: which experts each token was routed to, and what is known of the choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import UsageError

Experts: TypeAlias = npt.NDArray[np.int16]
Halves: TypeAlias = npt.NDArray[np.float16]

#: The experts of a token, and numbers of its routers [N, layers]: beside `routed_experts`, or not at all.
EXPERTS: Final = "routed_experts"
OF_ROUTERS: Final = ("router_margins", "router_inputs")


def check_routing(columns: Mapping[str, npt.NDArray[Any]]) -> None:
    """Raise UsageError for columns of a routing that are not of each other's shape, or whose experts are none."""
    experts = columns.get(EXPERTS)
    for name in OF_ROUTERS:
        column = columns.get(name)
        if column is not None and (experts is None or column.shape != experts.shape[:2]):
            of = "there is no routed_experts" if experts is None else f"routed_experts is {list(experts.shape)}"
            raise UsageError(f"Trace column {name} is {list(column.shape)}, and {of}: expected one number a token and layer")
    if experts is None or not len(experts):
        return
    if 0 in experts.shape:
        raise UsageError(f"Trace column routed_experts is {list(experts.shape)}: expected [tokens, layers, experts per token]")
    if experts.min() < -1:
        raise UsageError(f"Trace column routed_experts has the expert {experts.min()}; experts are 0 and above, -1: not known")
    if (lacking := np.flatnonzero(columns["mask"] & (experts < 0).any(axis=(1, 2)))).size and known_share(experts) > 0:
        lost = f"{lacking.size:,} of {int(columns['mask'].sum()):,} tokens, the first at row {lacking[0]}"
        raise UsageError(f"Trace column routed_experts is missing for {lost}: give the routing of every token, or of none")


def known_share(experts: Experts) -> float:
    """The share of the tokens (0 to 1) whose experts are known."""
    return float(np.mean((experts >= 0).all(axis=(1, 2)))) if len(experts) else 0.0


def completion_rows(rows: Any, prompt: int, length: int) -> Experts:
    """The routing [length, layers, k] of a completion, from that of its tokens or of its whole sequence [rows, layers, k].

    An engine's row i is the routing of token i of prompt and completion, which predicts token i + 1: prompt + length - 1 rows,
    of which the last `length` are the completion's. Layers without a router, which engines fill with one expert, are left out.
    Raises UsageError for another shape, for a row that is not filled, and for what is no number of an expert.
    """
    given = np.asarray(rows)
    if given.ndim != 3 or given.dtype.kind not in "iu":
        raise UsageError(
            f"routed_experts is {given.dtype} {list(given.shape)}: expected whole numbers [tokens, layers, experts per token]"
        )
    if len(given) not in (length, prompt + length - 1):
        raise UsageError(
            f"routed_experts has {len(given)} rows for a prompt of {prompt} and a completion of {length} tokens: expected "
            f"{length}, one for each token, or {prompt + length - 1}, one for each token of both but the last"
        )
    if given.size and (given.min() < -1 or given.max() > np.iinfo(np.int16).max):
        raise UsageError(f"routed_experts holds {given.min()} to {given.max()}: experts are 0 to {np.iinfo(np.int16).max}")
    kept = given[len(given) - length :].astype(np.int16)
    if not kept.size:
        return kept
    unfilled: npt.NDArray[np.bool_] = np.asarray((kept < 0).any(axis=-1))
    if kept.shape[2] > 1:
        ordered = np.sort(kept, axis=-1)
        unfilled |= (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
    if (empty := np.flatnonzero(unfilled.all(axis=1))).size:
        raise UsageError(
            f"routed_experts is not filled at token {empty[0]} of the completion ({empty.size} of {length} rows have no "
            "experts): a prefix cache or padding left a hole"
        )
    routers = ~unfilled.all(axis=0)
    if unfilled[:, routers].any():
        token, layer = np.argwhere(unfilled[:, routers])[0]
        raise UsageError(
            f"routed_experts names {kept[:, routers][token, layer].tolist()} at token {token}, layer {layer}: expected as many "
            "different experts"
        )
    return np.ascontiguousarray(kept[:, routers])
