"""Retokenisation: turns whose text encodes to other ids than were written, found and measured."""

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import MODEL
from pytest_logprob_parity import EngineSpec, Sampling, Trace, UsageError, check_golden, retokenisation
from pytest_logprob_parity.check.context import Context

QUESTION = "Ada has 12 apples and buys 30 more. Ada gives 7 to Ben. How many apples are left? Use the calculator."
ROLLOUT = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant"},
    {"role": "tool", "content": "42"},
    {"role": "assistant"},
]
SAMPLING = Sampling(temperature=0.7, n=4, max_tokens=30, seed=1)


@pytest.fixture(scope="module")
def turns(pool):
    """An engine, and rollouts of two turns whose tokens are the canonical encoding of their texts."""
    engine = pool.engine(EngineSpec(MODEL, dtype="float32"))
    return engine, engine.generate([ROLLOUT], SAMPLING)


def halves():
    """The two tokens that each merged token of the tiny model's tokenizer is made of, by id."""
    model = json.loads(Path(MODEL, "tokenizer.json").read_text())["model"]
    ids = model["vocab"]
    pairs = {ids[one + other]: (ids[one], ids[other]) for one, other in model["merges"] if one + other in ids}
    return {token: pair for token, pair in pairs.items() if all(i in ids.values() for i in pair)}


def split(trace, turn):
    """The trace with one merged token of turn `turn` of its first sequence written as its two halves."""
    known = halves()
    segment = next(s for s in trace.segments() if (s.sequence, s.turn) == (0, turn))
    place = next(i for i in range(segment.start, segment.stop) if int(trace.token_ids[i]) in known)
    sequences = []
    for i in range(trace.num_sequences):
        start, stop = trace.bounds(i)
        columns = {
            "token_ids": trace.token_ids[start:stop].tolist(), "logprobs": trace.logprobs[start:stop].tolist(),
            "mask": trace.mask[start:stop].tolist(),
        }  # fmt: skip
        if i == 0:
            at = place - start
            columns["token_ids"][at : at + 1] = known[int(trace.token_ids[place])]
            columns["logprobs"][at : at + 1] = [columns["logprobs"][at], -0.1]
            columns["mask"][at : at + 1] = [True, True]
        sequences.append({"prompt_token_ids": trace.prompt(i), **columns})
    made = Trace.from_sequences(sequences, sampling=trace.sampling, engine="vllm", dtype="float32")
    return made.with_(token_texts=trace.token_texts), place - segment.start


def test_canonical_turns_encode_to_their_own_ids(turns):
    engine, trace = turns
    found = retokenisation(trace, engine.tokenizer, engine)
    assert (found.turns, found.different, found.share) == (8, (), 0.0)
    assert str(found) == "all 8 turns encode to their own ids"


@pytest.mark.parametrize("turn", [0, 1])
def test_a_turn_with_a_split_token_is_found_where_it_is_and_its_logprobs_are_compared(turns, turn):
    engine, trace = turns
    planted, place = split(trace, turn)
    found = retokenisation(planted, engine.tokenizer, engine)
    assert (found.turns, len(found.different)) == (8, 1)
    first = found.first
    assert (first.sequence, first.turn, first.position) == (0, turn, place)
    assert len(first.written) == len(first.encoded) + 1
    written, encoded = first.logprobs
    segment = next(s for s in trace.segments() if (s.sequence, s.turn) == (0, turn))
    np.testing.assert_allclose(encoded, trace.logprobs[segment.start : segment.stop].sum(), atol=1e-3)
    assert first.shift == encoded - written
    assert first.shift > 0.5  # the model was not trained on split tokens
    assert first.after_rms > 1e-3
    assert f"1 of 8 turns (12.5%) encode to other ids than the engine wrote, first sequence 0, turn {turn}" in str(found)


def test_a_golden_of_such_turns_says_so_when_it_is_recorded_checked_and_shown(turns, tmp_path, capsys):
    from pytest_logprob_parity.cli import main

    engine, trace = turns
    planted, _ = split(trace, 1)
    replayed = engine.replay(planted).with_(replay="", forcing=None)
    path = tmp_path / "g.safetensors"
    check_golden(path, replayed, update=True, repeats=0)
    checked = check_golden(path, engine, replay=("decode",), context=Context())
    assert [n for n in checked.notes if n.key == "retokenised" and "1 of 8 turns" in n]
    canonical = tmp_path / "c.safetensors"
    recorded = check_golden(canonical, engine, prompts=[ROLLOUT], sampling=SAMPLING, update=True, repeats=2)
    assert "retokenised" not in [n.key for n in (*recorded.notes, *check_golden(canonical, engine).notes)]
    assert main(["show", str(canonical)]) == 0
    assert "retokenisation" not in capsys.readouterr().out


def test_without_a_tokenizer_there_is_nothing_to_encode_with(turns):
    with pytest.raises(UsageError, match="retokenisation needs the model's tokenizer"):
        retokenisation(turns[1], None)
