"""Which tokens of a mixture of experts were routed to other experts, whether at a tie, and what that does to their logprobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from ..grammar import counted
from ..notes import Note
from ..trace import Trace
from .alignment import Alignment
from .findings import Cause, Finding
from .sides import Names

_Bools: TypeAlias = npt.NDArray[np.bool_]

#: A choice is a tie where its margin is at most this share of the median margin of its layer. A router was given something
#: else where its input moved by more than the second share of the RMS of such inputs, or half of its layer's inputs by more
#: than the third. By dtype: several times what moves between bfloat16 and float32, and 0.045, 0.02 (99 %) and 0.005 were
#: measured there (benchmarks/bench_routing.py).
_TIE: Final = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.2}
_INPUT: Final = {"float32": 0.005, "float16": 0.02, "bfloat16": 0.1}
_INPUTS: Final = {"float32": 0.001, "float16": 0.005, "bfloat16": 0.02}
#: Other experts are no accident where this share of the tokens has them, beyond ties.
_REAL: Final = 0.01
#: Other experts explain a failure where the tokens that have them carry this share of the squared difference, or are so many
#: times as far off (RMS) as the others, whose context has other experts too.
_EXPLAINS: Final = 0.5
_FURTHER: Final = 1.5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutingAgreement:
    """The routing of n aligned tokens on both sides, and the differences d (nats) of their logprobs; NaN where there is none.

    `agreement` is the share of the tokens with the same experts, for each layer. Of a token with other experts in some layer
    the first such layer counts: `ties` [n] were within noise of another choice, `given` [n] had routers that were given
    something else, `chosen` [n] routers that were given the same and chose otherwise. `first` is the first layer that
    routes more tokens otherwise than ties explain, `moved` the first layer whose routers were given something else for half of
    the tokens, None where there is none; `shift` is by how much (the median, a share of their RMS). `contradict` counts the
    tokens with choices of the actual side that are not the largest of its own router's logits. `known` says whether both sides
    tell margins and inputs.
    """

    tokens: int
    agreement: tuple[float, ...]
    flips: _Bools
    ties: _Bools
    given: _Bools
    chosen: _Bools
    first: int | None
    moved: int | None
    shift: float
    contradict: int
    known: bool
    d: npt.NDArray[np.float64]

    @property
    def numbers(self) -> dict[str, float]:
        """The metrics: shares of tokens and layers (0 to 1), counts of tokens, RMS differences (nats)."""
        return {
            "routing_agreement": float(np.mean(self.agreement)),
            "routing_flips": float(np.count_nonzero(self.flips)),
            "routing_ties": float(np.count_nonzero(self.ties)),
            "routing_real_flips": float(np.count_nonzero(self.real)),
            "rms_diff_same_experts": _rms(self.d[~self.flips]),
            "rms_diff_other_experts": _rms(self.d[self.flips]),
            "share_by_other_experts": self.share(self.flips),
        }

    @property
    def real(self) -> _Bools:
        """Tokens [n] whose first other expert is no tie."""
        return self.flips & ~self.ties if self.known else np.zeros_like(self.flips)

    def share(self, tokens: _Bools) -> float:
        """The share (0 to 1) of the squared difference that `tokens` [n] carry."""
        squares = np.square(np.nan_to_num(self.d))
        total = float(squares.sum())
        return float(squares[tokens].sum()) / total if total else 0.0

    def sizes(self) -> str:
        """How far off (RMS, nats) tokens with other experts are, and tokens with the same, in words."""
        sides = [f"{_rms(self.d[self.flips]):.2g} nats of tokens with other experts"]
        sides += [f"{_rms(self.d[~self.flips]):.2g} of tokens with the same"] if (~self.flips).any() else []
        return f"RMS difference {', '.join(sides)}"

    def explains(self, tokens: _Bools) -> bool:
        """Whether `tokens` [n] carry the difference, or are further off than the others."""
        return self.share(tokens) >= _EXPLAINS or _rms(self.d[tokens]) > _FURTHER * _rms(self.d[~tokens])


def routing_agreement(expected: Trace, actual: Trace, rows: Alignment) -> RoutingAgreement | None:
    """The agreement of two traces that both tell a routing, of one shape; else None."""
    e, a = expected.routed_experts, actual.routed_experts
    if e is None or a is None or e.shape[1:] != a.shape[1:] or not rows.tokens:
        return None
    e, a = e[rows.expected], a[rows.actual]
    told: _Bools = np.asarray((e >= 0).all(axis=(1, 2)) & (a >= 0).all(axis=(1, 2)))
    if not told.any():
        return None
    other = (np.sort(e[told], axis=-1) != np.sort(a[told], axis=-1)).any(axis=-1)
    margins, inputs = (_pair(expected, actual, rows, told, name) for name in ("router_margins", "router_inputs"))
    known = margins is not None and inputs is not None
    flips = other.any(axis=1)
    tie = moved = np.zeros_like(other)
    shifts = np.zeros(other.shape[1])
    contradict = 0
    if margins is not None and inputs is not None:
        tie = _ties(margins[0], expected.dtype, actual.dtype)
        shift = _shift(*inputs)
        shifts = np.median(shift, axis=0)
        moved = shift > _of(_INPUT, expected.dtype, actual.dtype)
        contradict = int(np.count_nonzero((margins[1] < 0).any(axis=1) & ~(margins[0] < 0).any(axis=1)))
    layers = shifts > _of(_INPUTS, expected.dtype, actual.dtype)
    moved = moved | layers
    place = other.argmax(axis=1)[:, None]
    at_tie = flips & np.take_along_axis(tie, place, axis=1)[:, 0]
    had_moved = flips & ~at_tie & np.take_along_axis(moved, place, axis=1)[:, 0]
    beyond = np.mean(other & ~tie, axis=0) > _REAL
    d = np.subtract(actual.logprobs[rows.actual], expected.logprobs[rows.expected], dtype=np.float64)[told]
    d[~np.isfinite(d)] = np.nan
    return RoutingAgreement(
        tokens=int(told.sum()),
        agreement=tuple(float(share) for share in 1 - other.mean(axis=0)),
        flips=flips,
        ties=at_tie,
        given=had_moved,
        chosen=flips & ~at_tie & ~had_moved,
        first=int(beyond.argmax()) if known and beyond.any() else None,
        moved=int(layers.argmax()) if layers.any() else None,
        shift=float(shifts[layers.argmax()]),
        contradict=contradict,
        known=known,
        d=d,
    )


def _pair(expected: Trace, actual: Trace, rows: Alignment, told: _Bools, name: str) -> tuple[Any, Any] | None:
    """A column of both sides' routers [n, layers]; None where a side has none."""
    e, a = getattr(expected, name), getattr(actual, name)
    if e is None or a is None:
        return None
    return e[rows.expected][told].astype(np.float32), a[rows.actual][told].astype(np.float32)


def _of(by_dtype: Mapping[str, float], *dtypes: str) -> float:
    """What is listed for the coarsest of these dtypes."""
    known = [{"float64": "float32"}.get(dtype, dtype) for dtype in dtypes]
    return max(by_dtype.get(dtype, by_dtype["bfloat16"]) for dtype in known)


def _ties(margins: Any, *dtypes: str) -> _Bools:
    """Where the expected side's choice [n, layers] was within noise of another one. A layer without margins has none."""
    typical = np.nanmedian(np.where(np.isnan(margins).all(axis=0), 0.0, margins), axis=0)
    return np.asarray(margins <= _of(_TIE, *dtypes) * np.maximum(typical, 0))


def _shift(expected: Any, actual: Any) -> npt.NDArray[np.float64]:
    """By how much the inputs [n, layers] of the routers moved: a share of their RMS."""
    scale = np.sqrt(np.nanmean(np.square(expected), axis=0))
    return np.asarray(np.abs(actual - expected) / np.where(scale > 0, scale, 1), np.float64)


def _rms(d: npt.NDArray[np.float64]) -> float:
    d = d[np.isfinite(d)]
    return float(np.sqrt(np.mean(d**2))) if len(d) else float("nan")


# -- what is said of it -----------------------------------------------------------------------------------------------


def routing_note(expected: Trace, actual: Trace, routing: RoutingAgreement | None, names: Names) -> list[Note]:
    """How far two sides route tokens to the same experts; nothing where all agree, or where a side has no routing."""
    if routing is None:
        e, a = expected.routed_experts, actual.routed_experts
        if e is None or a is None or e.shape[1] == a.shape[1]:
            return []
        text = (
            f"expert routing not compared: {counted(e.shape[1], 'layers')} in {names.expected}, {a.shape[1]} in "
            f"{names.actual}: the routing of another model"
        )
        return [Note("expert_routing", text)]
    if not routing.flips.any():
        return []
    layers = ", ".join(f"{share:.2%}" for share in routing.agreement)
    text = (
        f"expert routing: {int(routing.flips.sum()):,} of {counted(routing.tokens, 'tokens')} have another expert in some "
        f"layer (the same experts by layer: {layers})"
    )
    if routing.known:
        text += (
            f"; {int(routing.ties.sum()):,} of them at a tie between experts, {int(routing.given.sum()):,} in a router that "
            f"was given something else, {int(routing.chosen.sum()):,} in a router that chose otherwise"
        )
    if np.isfinite(routing.d).any():
        text += f". {routing.sizes()}; the first carry {routing.share(routing.flips):.0%} of the squared difference"
    return [Note("expert_routing", text)]


def routing_finding(expected: Trace, actual: Trace, routing: RoutingAgreement | None, names: Names) -> Finding | None:
    """`expert_routing` where the two sides use another number of experts, or where one side's routers choose otherwise; the
    first candidate where routers are given something else from a layer on that is not the first.

    None where ties explain the other experts, and where what the first router is given differs: then something before it
    differs, and the experts follow. With `proof` among its values a finding shows what no noise does.
    """
    e, a = expected.routed_experts, actual.routed_experts
    if routing is None:
        if e is None or a is None or e.shape[1] != a.shape[1] or e.shape[2] == a.shape[2]:
            return None
        text = f"{counted(e.shape[2], 'experts')} for each token in {names.expected}, {a.shape[2]} in {names.actual}"
        values = {"expected": e.shape[2], "actual": a.shape[2], "proof": True}
        return Finding(layer="path", cause="expert_routing", evidence=text, values=values)
    values = {**routing.numbers, "first_layer": routing.first, "agreement": list(routing.agreement)}
    if routing.contradict > _REAL * routing.tokens:
        count = counted(routing.contradict, "tokens")
        text = f"{names.actual} uses experts that are not the best of its own router's logits, for {count}"
        return _finding(text, routing, values | {"proof": True})
    if np.mean(routing.chosen) > _REAL and routing.explains(routing.real):
        return _finding(f"from layer {routing.first} on routers that were given the same choose other experts", routing, values)
    if not routing.moved:
        return None
    layer, before = routing.moved, routing.moved - 1
    text = (
        f"the routers up to layer {before} are given the same and choose the same experts; that of layer {layer} is given "
        f"something else (by {routing.shift:.1%}): the experts of layer {before}, how their outputs are weighed, or the "
        f"attention of layer {layer}"
    )
    candidates: tuple[Cause, ...] = ("expert_routing", "weights_differ", "stale_weights", "engine_build")
    return Finding(layer="path", cause=None, evidence=text, candidates=candidates, values=values | {"moved": layer})


def _finding(text: str, routing: RoutingAgreement, values: dict[str, Any]) -> Finding:
    text += (
        f": {int(routing.real.sum()):,} of {counted(routing.tokens, 'tokens')} have other experts that no tie explains "
        f"({int(routing.ties.sum()):,} more at a tie). {routing.sizes()}"
    )
    return Finding(layer="path", cause="expert_routing", evidence=text, values=values)
