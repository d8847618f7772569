"""What an engine kind must do, and what it may do besides: small protocols, with the data that they exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..spec import PROFILES, Sampling
from ..trace import Forcing

if TYPE_CHECKING:
    from ..checkpoint.weight_update import WeightUpdate
    from ..notes import Note

_T = TypeVar("_T")

#: Codes in `Completion.drafted`.
ACCEPTED, REPLACED = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to write, to be forced along, or to score.

    `sampling` is read for one sequence (`n` and its own `seed` play no part); `seed` is None where no random numbers
    are drawn for it. With `forced_token_ids` the engine decodes, and each step takes the token that stands there. With
    `scored_token_ids` it says the logprobs of those tokens in one prefill instead. With `tells_kept` it also says what
    truncation kept and which experts were used, if it can.
    """

    prompt_token_ids: Sequence[int]
    sampling: Sampling
    seed: int | None = None
    forced_token_ids: Sequence[int] | None = None
    scored_token_ids: Sequence[int] | None = None
    tells_kept: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSets:
    """What truncation left of one request, seen in the decode itself: L tokens.

    `counts` [L] say how many tokens were kept, `token_ids` [sum of counts] which, one position after the other.
    `untruncated_logprobs` [L] are those of the chosen tokens before truncation, None where the engine does not tell.
    """

    counts: npt.NDArray[np.int32]
    token_ids: npt.NDArray[np.int32]
    untruncated_logprobs: npt.NDArray[np.float32] | None = None

    def first(self, tokens: int) -> KeptSets | None:
        """The first `tokens` of them; None where there are not so many."""
        if tokens >= len(self.counts):
            return self if tokens == len(self.counts) else None
        counts, free = self.counts[:tokens], self.untruncated_logprobs
        ids = self.token_ids[: int(counts.sum(dtype=np.int64))]
        return KeptSets(counts=counts, token_ids=ids, untruncated_logprobs=None if free is None else free[:tokens])


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Which experts a request's L tokens were routed to, in the forward pass that predicts each.

    `experts` [L, layers, k]; `margins` [L, layers]: by how much the router's logit of the least chosen expert exceeds that of
    the best other one; `inputs` [L, layers]: a number of what the router was given. None where the engine does not tell.
    """

    experts: npt.NDArray[np.int16]
    margins: npt.NDArray[np.float16] | None = None
    inputs: npt.NDArray[np.float16] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine wrote for one request, L tokens: `token_ids`, `logprobs` and `ranks` [L], the top-k [L, K].

    `drafted` [L]: how each token came about under speculative decoding: 0, ACCEPTED (a draft), REPLACED (drawn in place of a
    rejected draft); None where the engine does not tell.
    `engine_versions` [L] are there where a weight update came on the way and the engine labels its tokens: 0 for the weights
    before it, 1 for those after it, -1 for any other label.
    `kept` and `routing` are there where the request asks for it (`tells_kept`) and the engine tells: `kept` where its sampling
    truncates, `routing` where the model is a mixture of experts.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]
    top_token_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]
    finish_reason: str
    drafted: npt.NDArray[np.uint8] | None = None
    engine_versions: npt.NDArray[np.int32] | None = None
    kept: KeptSets | None = None
    routing: Routing | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """What a started engine really uses, read back from it.

    `values` are JSON values under engine-argument names; `unverified` names settings that were asked for and that the
    engine does not tell; `forcing` is how decode replay forces tokens, None where it cannot, and then `unforced` says why.
    `generates` is False for an engine that only scores tokens.
    `libraries` are the engine's, {} where it tells none, None where they are this process's. `vocabulary` is how many token
    ids it has logits for, from 0 on; None where it does not tell.
    """

    engine: str
    version: str
    dtype: str
    values: Mapping[str, Any]
    unverified: tuple[str, ...] = ()
    forcing: Forcing | None = "sampler"
    unforced: str = ""
    generates: bool = True
    hardware: Mapping[str, Any] = field(default_factory=dict)
    libraries: Mapping[str, str] | None = None
    vocabulary: int | None = None

    @property
    def forces(self) -> bool:
        """Whether decode replay can force tokens."""
        return self.forcing is not None

    @property
    def logprobs_mode(self) -> str:
        """`processed_logprobs` or `raw_logprobs`: what decode logprobs mean."""
        return str(self.values.get("logprobs_mode", "raw_logprobs"))

    @property
    def max_model_len(self) -> int | None:
        """The longest prompt and completion together, in tokens."""
        value = self.values.get("max_model_len")
        return None if value is None else int(value)

    def differences_from_rl(self) -> dict[str, tuple[Any, Any]]:
        """Where the engine differs from profile `rl`: setting -> (what `rl` pins, what the engine uses)."""
        pins = PROFILES["rl"]
        return {k: (v, self.values[k]) for k, v in pins.items() if k in self.values and self.values[k] != v}


class Backend(Protocol):
    """A started engine."""

    config: ResolvedConfig

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer all requests in one batched call, in their order. Raises EngineError; the engine is then dead."""
        ...

    def close(self) -> None:
        """Shut down and leave nothing behind. Safe to call twice."""
        ...


@runtime_checkable
class TakesWeights(Protocol):
    """A backend that takes weight updates: between requests, or while requests run."""

    def update_weights(self, update: WeightUpdate) -> None:
        """Take new weights while no request runs."""
        ...

    def run_through(self, requests: Sequence[Request], update: WeightUpdate) -> tuple[list[Completion], list[int]]:
        """Answer all requests with a weight update on the way; also how many tokens each had written by then."""
        ...


@runtime_checkable
class Sleeps(Protocol):
    """A backend that can give its memory away for a while."""

    def sleep(self, level: int) -> None:
        """Keep the weights on the host (1), or nowhere (2)."""
        ...

    def wake_up(self, tags: list[str] | None) -> None:
        """Take the memory back: of `weights`, of `kv_cache`, or of all."""
        ...


@runtime_checkable
class SharesThisProcess(Protocol):
    """A backend whose library keeps state in this process, which the end of somebody else's engine may take away."""

    def is_whole(self) -> bool:
        """Whether that state is still there."""
        ...


@runtime_checkable
class RunsOnWorker(Protocol):
    """A backend whose workers live in this process."""

    def on_worker(self, work: Callable[[Any], Any]) -> list[Any]:
        """Run `work(worker)` on each worker."""
        ...


@runtime_checkable
class ChecksumsWeights(Protocol):
    """A backend with checksums of its own of the weights in its memory."""

    def weight_checksums(self) -> dict[str, str]:
        """The checksum of each parameter; empty where it has none."""
        ...


@runtime_checkable
class TellsDigests(Protocol):
    """A backend that tells the digests of the model that it serves."""

    digests: Mapping[str, str]


@runtime_checkable
class Remarks(Protocol):
    """A backend that has something to say beside its answers."""

    def remarks(self) -> list[Note]:
        """The remarks since the last time."""
        ...


def sleeper(backend: Backend) -> Sleeps:
    """The backend, where it can sleep. Raises UsageError."""
    if not isinstance(backend, Sleeps):
        raise UsageError(f"{backend.config.engine} has no sleep")
    return backend


def take_weights(backend: Backend, update: WeightUpdate) -> None:
    """Have a backend take an update while nothing runs. Raises UsageError where it takes none."""
    if not isinstance(backend, TakesWeights):
        raise UsageError(f"{backend.config.engine} takes no weight updates")
    backend.update_weights(update)
