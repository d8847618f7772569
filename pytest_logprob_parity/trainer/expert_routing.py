"""The experts that the trainer's model uses for the rollouts' tokens, against the engine's; and what replaying them removes.

Routing replay (R2, R3) makes the trainer use the experts of the rollouts. Here it is done once, to measure what it would
remove of the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..comparison.result import Finding
from ..errors import UsageError
from ..notes import Note
from ..trace import Trace
from .scorer import Declared, Scorer
from .scoring import rms, score
from .transformers_routers import routers_of, watched

#: Replay explains a failure where it leaves no more than this share of the RMS difference.
_EXPLAINS: Final = 0.5


class _Watched:
    """A scorer whose routers are watched while it scores the sequences of `trace`, and with `replay` forced to use its experts.

    `experts` [N, layers, k] are those that were used last for each token of the trace; -1 where none was seen.
    """

    def __init__(self, scorer: Any, routers: list[Any], trace: Trace, *, replay: bool = False) -> None:
        assert trace.routed_experts is not None
        self._scorer = scorer
        self._routers = routers
        self._trace = trace
        self._recorded = trace.routed_experts
        self._replay = replay
        self._sequences: dict[tuple[int, ...], list[int]] = {}
        for sequence in range(trace.num_sequences):
            whole = (*trace.prompt(sequence), *trace.completion(sequence))
            self._sequences.setdefault(whole, []).append(sequence)
        self.experts = np.full(self._recorded.shape, -1, np.int16)

    def replaying(self) -> _Watched:
        """The same scorer, which uses the rollouts' experts; its own for prompts and tokens of the environment."""
        return _Watched(self._scorer, self._routers, self._trace, replay=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    def __call__(self, token_ids: Any, attention_mask: Any, temperature: float, **more: Any) -> Any:
        import torch

        present = attention_mask.bool()
        rows = [tuple(ids[kept].tolist()) for ids, kept in zip(token_ids, present, strict=True)]
        where = [self._sequences.get(row, []) for row in rows]
        sequences = [found.pop(0) if found else None for found in where]  # equal rows are one after the other's
        for row, sequence in zip(rows, sequences, strict=True):
            if sequence is not None:
                self._sequences[row].append(sequence)
        packed = bool(getattr(self._scorer, "packed", False))
        forced = None
        if self._replay:
            whole = self._forced(token_ids.shape, present, sequences)
            forced = whole[present] if packed else whole.flatten(0, 1)
        with watched(self._routers, forced) as chosen:
            answer = self._scorer(token_ids, attention_mask, temperature, **more)
        used = torch.stack(chosen, dim=1).cpu()
        seen = used.new_full((*token_ids.shape, *used.shape[1:]), -1)
        if packed:
            seen[present] = used
        else:
            seen = used.reshape(seen.shape)
        for n, sequence in enumerate(sequences):
            if sequence is not None:
                start, stop = self._trace.bounds(sequence)
                self.experts[start:stop] = seen[n][present[n]][:-1][start - stop :].numpy()
        return answer

    def _forced(self, shape: Any, present: Any, sequences: list[int | None]) -> Any:
        """The recorded experts [B, L, layers, k] of a batch: those of a token in the row of the token before it; -1: none."""
        import torch

        rows = torch.full((*shape, *self._recorded.shape[1:]), -1, dtype=torch.long)
        for n, sequence in enumerate(sequences):
            if sequence is not None:
                start, stop = self._trace.bounds(sequence)
                places = present[n].nonzero()[:, 0][:-1][start - stop :]
                rows[n, places] = torch.from_numpy(self._recorded[start:stop].astype(np.int64))
        return rows


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainersRouting:
    """How far the trainer's model routes as the rollouts say, over their n unmasked tokens.

    `agreement` is the share of the tokens with the same experts, for each layer; `own` and `replayed` are RMS differences
    (nats) to the rollouts, with the trainer's own experts and with the rollouts'; `flipped` is the share of the tokens with
    another expert in some layer.
    """

    agreement: tuple[float, ...]
    flipped: float
    own: float
    replayed: float

    @property
    def explained(self) -> float:
        """The share of the squared difference (1 and below) that replaying the rollouts' experts removes."""
        return 1 - (self.replayed / self.own) ** 2 if self.own else 0.0

    @property
    def numbers(self) -> dict[str, float]:
        """The metrics."""
        return {
            "trainer_routing_agreement": float(np.mean(self.agreement)),
            "trainer_routing_flipped": self.flipped,
            "rms_diff_replayed_routing": self.replayed,
        }

    def note(self) -> Note:
        """Agreement and what replay removes, in a sentence."""
        layers = ", ".join(f"{share:.1%}" for share in self.agreement)
        text = (
            f"expert routing: the trainer uses the rollouts' experts for {np.mean(self.agreement):.1%} of the tokens and "
            f"layers (by layer: {layers}); {self.flipped:.1%} of the tokens have another expert in some layer"
        )
        if self.flipped:
            text += (
                f". With the rollouts' experts in place of its own (routing replay) the RMS difference is {self.replayed:.2g} "
                f"nats in place of {self.own:.2g}: replay removes {max(self.explained, 0):.0%} of the squared difference"
            )
        return Note("expert_routing", text)

    def finding(self) -> Finding | None:
        """`expert_routing` where replay leaves half of the RMS difference or less; else None."""
        if not self.own or self.replayed > _EXPLAINS * self.own:
            return None
        text = (
            f"the trainer routes {self.flipped:.1%} of the tokens to other experts than the engine did; with the rollouts' "
            f"experts in place of its own the RMS difference is {self.replayed:.2g} nats in place of {self.own:.2g}: replay "
            "the rollouts' experts (R2, R3), or find out why the routers differ"
        )
        values = {"agreement": list(self.agreement), "own": self.own, "replayed": self.replayed}
        return Finding(layer="path", cause="expert_routing", evidence=text, values=values)


def with_watched_routers(trace: Trace, scorer: Scorer) -> Scorer:
    """The scorer with its routers watched, where the rollouts have a routing and its model has routers; else as it is.

    Raises UsageError for a routing that is not of this model.
    """
    recorded = trace.routed_experts
    routers = routers_of(Declared.by(scorer).model)
    if recorded is None or not routers or not (recorded >= 0).any():
        return scorer
    _check_is_this_models(recorded, routers)
    return _Watched(scorer, routers, trace)


def trainers_routing(
    trace: Trace, expected: Trace, scored: Trace, scorer: Scorer, batch_size: int
) -> TrainersRouting | None:  # fmt: skip
    """Compare the experts that were seen while `scorer` (`with_watched_routers`) made `scored` with the rollouts', and score
    once more with the rollouts' experts; differences are to `expected`. None where no routers were watched.
    """
    recorded = trace.routed_experts
    if recorded is None or not isinstance(scorer, _Watched):
        return None
    experts = scorer.experts
    told = trace.mask & (recorded >= 0).all(axis=(1, 2)) & (experts >= 0).all(axis=(1, 2))
    if not told.any():
        return None
    other = (np.sort(experts[told], axis=-1) != np.sort(recorded[told], axis=-1)).any(axis=-1)
    agreement = tuple(float(share) for share in 1 - other.mean(axis=0))
    replayed = scored
    if other.any():
        try:
            replayed = score(trace, scorer.replaying(), batch_size=batch_size)
        except NotImplementedError:
            return None
    return TrainersRouting(
        agreement=agreement,
        flipped=float(other.any(axis=1).mean()),
        own=rms(expected, scored),
        replayed=rms(expected, replayed),
    )


def _check_is_this_models(recorded: npt.NDArray[Any], routers: list[Any]) -> None:
    layers, k = recorded.shape[1:]
    experts, per_token = int(routers[0].num_experts), int(routers[0].top_k)
    if (layers, k) != (len(routers), per_token) or recorded.max() >= experts:
        raise UsageError(
            f"the rollouts' routed_experts are of {layers} layers with {k} experts for each token, up to number "
            f"{recorded.max()}; the trainer's model has {len(routers)} layers of {experts} experts, {per_token} for each "
            "token: the routing is another model's"
        )
