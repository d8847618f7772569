"""`logprob-parity show`: what a golden holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ParityError
from ..grammar import counted
from ..visible_text import visible_line
from .json_output import to_text
from .verb import Verbs, add_verb, say

if TYPE_CHECKING:
    from ..golden import Golden
    from ..notes import Note


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = add_verb(
        verbs,
        "show",
        "what a golden holds and what it was recorded from",
        "Its engine, settings, sampling, noise floor and reference, and its first sequences. Needs no engine.",
        run=run,
        status={0: "shown"},
    )
    verb.add_argument("golden", type=Path, help="the golden's file")
    verb.add_argument("--json", action="store_true", help="print JSON (see docs/reference/json.md)")


def run(given: argparse.Namespace) -> int:
    """Print what the golden holds. Gives 0."""
    from ..golden import Golden, describe, variant_path, variants_at

    golden = Golden.load(given.golden)
    trace = golden.trace
    variants = [path.name for path in variants_at(variant_path(given.golden, "")) if path.name != given.golden.name]
    if given.json:
        labels = {k: v for k, v in trace.to_metadata().items() if k != "token_texts"}
        counts = {
            "sequences": trace.num_sequences,
            "prompts": trace.num_prompts,
            "tokens": trace.num_tokens,
            "top_k": trace.top_k,
        }
        about: dict[str, Any] = {"node_id": golden.node_id, "name": golden.name, "prompts_digest": golden.prompts_digest}
        about |= {"tolerance": dict(golden.tolerance), "floor": None if golden.floor is None else golden.floor.to_json()}
        say(to_text("show", {**about, **counts, "variants": variants, "trace": labels, "fingerprint": golden.fingerprint}))
        return 0
    others = [f"  variant    {name}" for name in variants]
    say("\n".join([visible_line(given.golden), *(f"  {line}" for line in describe(golden)), *others]))
    for note in _retokenised(golden):
        say(f"  {note}")
    for sequence in range(min(trace.num_sequences, 8)):
        start, stop = trace.bounds(sequence)
        text = "".join(trace.text(t) for t in trace.completion(sequence))
        total = float(trace.logprobs[start:stop][trace.mask[start:stop]].sum())
        line = f"prompt {int(trace.group[sequence])}, {counted(stop - start, 'tokens')}, logprob {total:.3f}"
        say(f"  [{sequence}] {line}: {text!r:.100}")
    if trace.num_sequences > 8:
        say(f"  and {counted(trace.num_sequences - 8, 'more sequences')}")
    return 0


def _retokenised(golden: Golden) -> list[Note]:
    """A note on turns of multi-turn rollouts whose text encodes to other ids, where the golden's own tokenizer is on this
    machine; else none.
    """
    from ..checkpoint.digests import find_model, model_digests
    from ..checkpoint.prompts import tokenizer_of
    from ..trainer.retokenisation import has_turns, retokenisation_notes

    if not has_turns(golden.trace):
        return []
    try:
        folder = find_model(str(golden.fingerprint.get("name") or ""), Path.cwd())
        if model_digests(folder, folder)["tokenizer"] != golden.fingerprint.get("tokenizer"):
            return []
        return retokenisation_notes(golden.trace, tokenizer_of(folder))
    except ParityError:
        return []
