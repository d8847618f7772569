"""Whether a golden belongs to this check: its prompts, its model, its sampling. Known before any engine starts."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..checkpoint.digests import digest_of
from ..checkpoint.prompts import tokenize
from ..engines.engine import Engine
from ..errors import IncomparableError, ParityError
from ..golden import Golden
from ..notes import Note
from ..spec import Sampling
from ..trace import Trace
from .context import Context

#: Parts of a fingerprint without which two goldens are not about the same thing.
_PARTS: Final = ("model", "tokenizer", "chat_template")


def another_part(golden: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The part of a fingerprint that makes two of them incomparable (`model`, `tokenizer`, `chat_template`), or ""."""
    return next((part for part in _PARTS if golden.get(part) != now.get(part)), "")


def check_belongs(
    golden: Golden, engine: Engine | Trace, given: list[Any] | None, sampling: Sampling | None, context: Context
) -> None:
    """Everything that can be known before an engine starts. Raises IncomparableError."""
    recorded = golden.trace.sampling
    sampling = None if sampling is None else sampling.as_run_by(golden.trace.engine)
    again = f"Record it again ({context.accept}), or restore the test"
    if sampling is not None and sampling != recorded:
        name = next(f.name for f in dataclasses.fields(Sampling) if getattr(sampling, f.name) != getattr(recorded, f.name))
        raise IncomparableError(
            f"{context.shown_path} was recorded with {name}={getattr(recorded, name)!r}, the test now samples with "
            f"{name}={getattr(sampling, name)!r}. {again}"
        )
    if given is not None and digest_of(given) != golden.prompts_digest:
        _check_prompt_tokens(golden.trace, engine, given, context, again)
    if isinstance(engine, Engine) and golden.fingerprint:
        now = engine.model_fingerprint()
        if part := another_part(golden.fingerprint, now):
            then = f"{golden.fingerprint.get('name')} ({golden.fingerprint.get(part)})"
            raise IncomparableError(
                f"{context.shown_path} was recorded with another {part.replace('_', ' ')}: {then}, now {now['name']} "
                f"({now[part]}). {again}"
            )


def renamed(engine: Engine | Trace, given: list[Any] | None, sampling: Sampling | None, context: Context) -> str:
    """How to get a missing golden from one that no test asks for and that this check could have recorded; else "".

    Of several it is the one whose test is called most like this one: tests of a file share prompts and sampling.
    """
    fitting: list[tuple[Path, Golden]] = []
    for path in context.orphans():
        try:
            golden = Golden.load(path)
            check_belongs(golden, engine, given, sampling, context)
        except ParityError:
            continue
        if not isinstance(engine, Trace) or _same_question(golden.trace, engine):
            fitting.append((path, golden))
    if not fitting:
        return ""
    path, golden = max(fitting, key=lambda found: _alike(found[1], context))
    shown = os.path.relpath(path)
    command = f"logprob-parity move {shlex.quote(shown)} {shlex.quote(context.node_id)}"
    command += f" --name {shlex.quote(context.name)}" if context.name != golden.name else ""
    command += f" --golden-dir {shlex.quote(context.golden_dir)}" if context.golden_dir != "golden" else ""
    others = f"; {len(fitting) - 1} more fit as well" if len(fitting) > 1 else ""
    return (
        f". {shown}, of {golden.node_id}, has its prompts, model and sampling, and no check asks for it{others}; if this check "
        f"had it: {command}"
    )


def _alike(golden: Golden, context: Context) -> tuple[bool, bool, float]:
    """How much a golden's check is called like this one: what stands behind the file, the check's name, all of it."""
    (_, _, then), (_, _, now) = (node_id.partition("::") for node_id in (golden.node_id, context.node_id))
    likeness = difflib.SequenceMatcher(None, golden.node_id, context.node_id).ratio()
    return then == now, golden.name == context.name, likeness


def _same_question(one: Trace, other: Trace) -> bool:
    return one.sampling == other.sampling and np.array_equal(one.prompt_token_ids, other.prompt_token_ids)


def temperature_notes(asked: Sampling | None, engine: str) -> tuple[Note, ...]:
    """A note where engines of the kind `engine` run another temperature than the test asks for."""
    if asked is None or asked.temperature == (ran := asked.as_run_by(engine).temperature):
        return ()
    text = f"temperature {asked.temperature:g} was asked for; {engine} samples with {ran:g}, its smallest above 0"
    return (Note("temperature", text),)


def _check_prompt_tokens(trace: Trace, engine: Engine | Trace, given: list[Any], context: Context, again: str) -> None:
    if isinstance(engine, Trace) and any(not isinstance(p, list) or not isinstance(p[0], int) for p in given):
        return  # nobody here can tokenize; the alignment sees the prompts' tokens
    tokenized = tokenize(given, None if isinstance(engine, Trace) else engine.tokenizer)
    now = [p.token_ids for p in tokenized]
    then = [tuple(trace.prompt_token_ids[a:b].tolist()) for a, b in itertools.pairwise(trace.prompt_offsets.tolist())]
    if now == then:
        return
    if len(now) != len(then):
        what = f"it has {len(then)}, the test {len(now)}"
    else:
        index = next(i for i, (a, b) in enumerate(zip(now, then, strict=True)) if a != b)
        text = "".join(trace.text(t) for t in then[index])
        what = f"prompts[{index}] is {given[index]!r:.60}, the golden's is {text!r:.60}"
    raise IncomparableError(f"{context.shown_path} belongs to other prompts: {what}. {again}")
