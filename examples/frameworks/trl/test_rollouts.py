from pathlib import Path

import pytest
from batch import batch_of, logprobs_of_trainer

from pytest_logprob_parity import Sampling, assert_trainer_parity
from pytest_logprob_parity.trainer.frameworks import framework

TRL = framework("trl")
MODEL = str(Path(__file__).resolve().parents[3] / "models" / "tiny-arith")
SAMPLING = Sampling(temperature=0.7, max_tokens=64, n=8, seed=1)
PROMPTS = [
    [{"role": "user", "content": question}]
    for question in (
        "Ada has 12 apples and buys 30 more. Ada gives 7 to Ben. How many apples are left?",
        "Dan fills 6 bags with 8 nuts each and finds 15 more. How many nuts does Dan have?",
        "Kim has 18 books. Leo has 9 more than Kim. How many books do they have together?",
    )
]


@pytest.mark.logprob_parity(model=MODEL, dtype="float32", profile=TRL.profile, enforce_eager=True)
def test_rollouts_and_trainer_agree(parity_engine):
    batch = batch_of(parity_engine.generate(PROMPTS, SAMPLING))  # yours comes from TRL
    batch["old_per_token_logps"] = logprobs_of_trainer(
        batch, MODEL, SAMPLING.temperature, "float32"
    )  # and so do its own logprobs
    rollouts = TRL.read(batch, sampling=SAMPLING, dtype="float32")
    assert_trainer_parity(rollouts, trainer_dtype="float32", metrics="trl")
    assert_trainer_parity(rollouts, TRL.scorer(MODEL, dtype="float32"), trainer_dtype="float32")  # a reference evaluation
