"""What an engine answers when it is asked about a golden: everything that a verdict needs of it, without the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..engines.replay import can_regenerate
from ..errors import UsageError
from ..notes import Note
from ..spec.server_settings import SERVERS
from ..trace import FloatArray, ReplayPath, Trace
from ..trainer.retokenisation import has_turns, retokenisation_notes

if TYPE_CHECKING:
    from ..engines.engine import Engine
    from ..golden import Golden
    from ..notes import Note


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Replays by path, and the `fingerprint` of the engine that made them.

    `policy_logprobs` [N] are without truncation, where the golden has its own; `draw` gives the logprobs [N] of a replay in
    shapes drawn as the golden's floor was, where it has one; `remarks` are what there is to say of the engine beside them.
    `unforced` says why a prefill stands in the place of decode, "" where it does not.
    """

    replays: Mapping[ReplayPath, Trace]
    fingerprint: Mapping[str, Any]
    policy_logprobs: FloatArray | None = None
    draw: Callable[[], FloatArray] | None = None
    remarks: Sequence[Note] = ()
    unforced: str = ""


_DECODES: Final[tuple[ReplayPath, ...]] = ("decode", "window")


def ask(engine: Engine, golden: Golden, paths: Sequence[ReplayPath]) -> Answers:
    """Replay a golden by `paths`; `regenerate` is left out where the golden does not know its seeds, or the engine only scores.

    Where a server cannot be forced along tokens, a prefill takes the place of decode.
    """
    unforced = why_unforced(engine, paths)
    if unforced:
        paths = without_decode(paths)
    generates = can_regenerate(golden.trace) and engine.config.generates
    wanted: list[ReplayPath] = [p for p in paths if p != "regenerate" or generates]
    if not wanted:
        raise UsageError(f"replay 'regenerate' alone: {engine.config.unforced}; add 'prefill'")
    replays = engine.replay_all(golden.trace, wanted)
    decoded = "decode" in wanted
    return Answers(
        replays=replays,
        fingerprint=engine.fingerprint(),
        policy_logprobs=_policy_logprobs(golden.trace, replays["decode"], engine) if decoded else None,
        draw=_drawn(golden, engine) if decoded else None,
        remarks=[*engine.remarks(), *_retokenised(golden.trace, engine)],
        unforced=unforced,
    )


def _retokenised(trace: Trace, engine: Engine) -> list[Note]:
    """A note on turns of a multi-turn golden whose text encodes to other ids, where there are any."""
    return retokenisation_notes(trace, engine.tokenizer) if has_turns(trace) else []


def why_unforced(engine: Engine, replay: Sequence[ReplayPath]) -> str:
    """Why a server cannot decode along given tokens, where that is asked of it; else ""."""
    config = engine.config
    asked = any(path in _DECODES for path in replay)
    return config.unforced if asked and config.engine in SERVERS else ""


def without_decode(replay: Sequence[ReplayPath]) -> tuple[ReplayPath, ...]:
    """The paths that are left: a prefill in the place of decode."""
    left: list[ReplayPath] = ["prefill" if path in _DECODES else path for path in replay]
    return tuple(dict.fromkeys(left))


def _drawn(golden: Golden, engine: Engine) -> Callable[[], FloatArray] | None:
    """How to ask the engine once more, in the shapes of the golden's floor: the draw after those of its repeats."""
    floor = golden.floor
    if floor is None:
        return None
    return lambda: engine.replay_in_batch_compositions(golden.trace, floor.compositions, floor.repeats)


def _policy_logprobs(trace: Trace, replayed: Trace, engine: Engine) -> FloatArray | None:
    """The engine's logprobs of the golden's tokens without truncation, where the golden has its own: those that the decode
    told beside the truncated ones, or those of one more replay.
    """
    comparable = engine.config.logprobs_mode == trace.logprobs_mode
    if trace.untruncated_logprobs is None or not comparable:
        return None
    if replayed.untruncated_logprobs is not None:
        return replayed.untruncated_logprobs
    return engine.replay(trace.with_(sampling=trace.sampling.untruncated())).logprobs
