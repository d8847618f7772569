"""Made-up traces, noise and references: what the tests of verdicts share."""

import math

import numpy as np

from pytest_logprob_parity import Sampling, Trace
from pytest_logprob_parity.golden.reference import Reference

OBJECTIVES = ("token", "sequence", "truncated", "unclipped")


def make_trace(sequences=50, tokens=40, *, prompts=None, temperature=1.0, dtype="bfloat16", seed=0, **columns):
    """A trace of `sequences` completions of `tokens` each (or of one number for each), of as many prompts or of `prompts`."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(np.broadcast_to(tokens, sequences))])
    prompts = prompts or sequences
    return Trace.from_arrays(
        **{
            "prompt_token_ids": np.arange(prompts),
            "prompt_offsets": np.arange(prompts + 1),
            "token_ids": rng.integers(0, 1000, offsets[-1]),
            "sequence_offsets": offsets,
            "logprobs": -1 - rng.exponential(0.7, offsets[-1]),
            "group": np.arange(sequences) * prompts // sequences,
            "sampling": Sampling(temperature=temperature),
            "dtype": dtype,
        }
        | columns
    )


def moved(trace, change):
    """The trace with `change` added to its logprobs."""
    return trace.with_(logprobs=(trace.logprobs + change).astype(np.float32))


def noise(trace, rms, seed=0):
    """Independent noise [N] of this RMS on a fifth of the tokens, none on the others."""
    rng = np.random.default_rng(seed)
    moves = rng.random(trace.num_tokens) < 0.2
    return np.where(moves, rng.normal(0, rms / math.sqrt(0.2), trace.num_tokens), 0)


def reference_of(trace, error, covered=1.0):
    """The reference that the trace is `error` [N] away from; NaN beyond the first `covered` (0 to 1) of its tokens."""
    logprobs = (trace.logprobs - error).astype(np.float32)
    logprobs[round(covered * len(logprobs)) :] = np.nan
    return Reference(logprobs, "made up", trace.num_sequences)


def gate(comparison, key):
    """The gate of this key."""
    return next(g for g in comparison.gates if g.key == key)


def outcomes(comparison):
    """What the gates that do not pass say, by key."""
    return {g.key: g.outcome for g in comparison.gates if g.outcome != "pass"}


def keys(comparison):
    """The keys of the notes."""
    return [note.key for note in comparison.notes]
