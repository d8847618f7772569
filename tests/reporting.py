"""What the tests of reports and of accepting share: a repo whose goldens are made up rollouts, and its commands."""

from pytest_logprob_parity.cli import main

PROJECT = """
import os
import numpy as np
from pytest_logprob_parity import Trace

SHIFT, NOISE = float(os.environ.get("SHIFT", 0)), float(os.environ.get("NOISE", 0))
TEXTS = {texts!r}

def rollouts(shift=0.0, noise=0.0, seed=0, sequences=12, length=30):
    rng = np.random.default_rng(seed)
    tokens = sequences * length
    top = -np.sort(rng.exponential(1.0, (tokens, 4)).astype(np.float32), axis=1)
    top -= np.log(np.exp(top).sum(axis=1, keepdims=True)) + np.float32(0.05)
    ids = rng.permuted(np.tile(np.arange(50, dtype=np.int32), (tokens, 1)), axis=1)[:, :4]
    ranks = np.minimum(rng.geometric(0.6, tokens), 4).astype(np.int32)
    moved = np.random.default_rng(1).normal(shift, noise, (tokens, 1)).astype(np.float32) if noise or shift else 0
    top = top + moved
    rows = np.arange(tokens)
    return Trace.from_arrays(
        prompt_token_ids=np.arange(2 * sequences) % 50, prompt_offsets=2 * np.arange(sequences + 1),
        token_ids=ids[rows, ranks - 1], sequence_offsets=length * np.arange(sequences + 1), logprobs=top[rows, ranks - 1],
        ranks=ranks, top_token_ids=ids, top_logprobs=top, dtype="bfloat16", engine="ours", engine_version="1.0",
        sampling=dict(temperature=0.7, logprobs=4), token_texts={{i: TEXTS[i % len(TEXTS)] for i in range(50)}},
    )

def test_moves(golden_trace):
    golden_trace.check(rollouts(SHIFT, NOISE))

def test_stays(golden_trace):
    golden_trace.check(rollouts(seed=1))
"""
#: The golden of the test whose numbers move with the variables SHIFT and NOISE.
MOVED = "golden/test_it/test_moves-*.safetensors"


def command(capsys, *arguments):
    """Exit status, output and errors of a `logprob-parity` command."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def one_line(capsys, *arguments):
    """The one line of a command that ends in trouble."""
    status, out, err = command(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("logprob-parity: ")
    assert err.count("\n") == 1
    return err
