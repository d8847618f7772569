"""What a downstream repo adds: an engine kind of its own by an entry point, and hooks in its conftest."""

import sys

import pytest
from test_registry import distribution

from conftest import MODEL, forked_workers
from pytest_logprob_parity import EngineSpec, UsageError
from pytest_logprob_parity.engines.pool import open_engine

CHAIN = """
import numpy as np

from pytest_logprob_parity.engines.backend import Completion, ResolvedConfig

TOKENS = 300


class Chain:
    'An engine whose next token depends on the last one alone.'

    def __init__(self, spec):
        logits = np.random.default_rng(7).normal(0, 2, (TOKENS, TOKENS)) * spec.settings.get("sharpness", 1.0)
        self._logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        self.config = ResolvedConfig(
            engine="chain", version="1.0", dtype="float32", vocabulary=TOKENS, libraries={},
            values={"logprobs_mode": "processed_logprobs", "max_model_len": 512, **spec.settings},
        )

    def run(self, requests):
        return [self._write(request) for request in requests]

    def close(self):
        pass

    def _write(self, request):
        rng, last, written = np.random.default_rng(request.seed), request.prompt_token_ids[-1] % TOKENS, []
        forced = request.scored_token_ids or request.forced_token_ids
        for step in range(len(forced or range(request.sampling.max_tokens))):
            row = self._logprobs[last]
            last = forced[step] if forced else int(rng.choice(TOKENS, p=np.exp(row)))
            written.append((last, row))
        ids = np.array([token for token, _ in written], np.int32)
        rows = np.array([row for _, row in written], np.float32)
        chosen = rows[np.arange(len(ids)), ids]
        top = np.argsort(-rows, axis=1, kind="stable")[:, : request.sampling.logprobs]
        return Completion(
            token_ids=ids, logprobs=chosen, ranks=(rows > chosen[:, None]).sum(1).astype(np.int32) + 1,
            top_token_ids=top.astype(np.int32), top_logprobs=np.take_along_axis(rows, top, 1), finish_reason="length",
        )


class Kind:
    distributions = ("chain",)
    may_live_apart = False

    def start(self, spec, model, tokenizer, adapter):
        return Chain(spec)


KIND = Kind()
"""

TEST = f"""
import pytest

pytestmark = pytest.mark.logprob_parity(model={MODEL!r}, engine="chain", dtype="float32")
PROMPTS = [[n, n + 1] for n in range(10, 40)]

def test_chain(parity_engine, golden_trace):
    golden_trace.check(parity_engine, prompts=PROMPTS, sampling=dict(max_tokens=40))
"""


@pytest.fixture
def chain(tmp_path_factory, monkeypatch):
    """A distribution that adds the engine kind `chain`."""
    folder = tmp_path_factory.mktemp("site")
    points = "[logprob_parity.engines]\nchain = chain_parity:KIND\nbroken = chain_parity:TOKENS\n"
    distribution(folder, "chain", points, chain_parity=CHAIN)
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("chain_parity", None)


@pytest.fixture
def project(chain, pytester):
    """A repo that tests the engine `chain`. Its model's weights play no part, so there is no reference of them."""
    pytester.makeini("[pytest]\nparity_reference = none\nparity_repeats = 2\nparity_obtained = trace\n")
    pytester.makepyfile(test_chain=TEST)
    return pytester


def test_an_engine_kind_of_another_distribution_is_recorded_and_checked(project, run_inner):
    run_inner("--update-golden").assert_outcomes(passed=1)
    run_inner().assert_outcomes(passed=1)
    sharper = run_inner("--parity-set", "sharpness=1.5")
    sharper.assert_outcomes(failed=1)
    sharper.stdout.fnmatch_lines(
        ["*findings*semantic: one of *temperature*the logits are 1.5000*", "*differs*config.sharpness*"]
    )


def test_an_unknown_engine_kind_lists_those_of_other_distributions(chain):
    with pytest.raises(UsageError, match=r"known are .*chain.*did you mean 'chain'"):
        EngineSpec("models/any", engine="chian")
    with (
        pytest.raises(UsageError, match="'broken', which is registered as chain_parity:TOKENS, is a int"),
        open_engine(EngineSpec(MODEL, engine="broken")) as engine,
    ):
        engine.config  # noqa: B018


CONFTEST = """
from pathlib import Path

def tell(line):
    with Path("hooks.txt").open("a") as stream:
        stream.write(line + "\\n")

def pytest_parity_recorded(item, name, path, comparison):
    tell(f"recorded {item.name} {name!r} {path.suffix} {comparison.verdict}")

def pytest_parity_judged(item, name, comparison):
    tell(f"judged {item.name} {name!r} {comparison.verdict}")

def pytest_parity_summary(config, records):
    return [f"to the dashboard: {[record['outcome'] for record in records]}"]
"""


@pytest.mark.parametrize("workers", [(), forked_workers(1)], ids=["serial", "xdist"])
def test_hooks_are_called_for_what_was_recorded_and_judged(project, run_inner, run_forked, monkeypatch, chain, workers):
    monkeypatch.setenv("PYTHONPATH", str(chain), prepend=":")
    project.makeconftest(CONFTEST)
    run = run_forked if workers else run_inner
    recorded = run("--update-golden", *workers)
    recorded.stdout.fnmatch_lines(["*1 recorded*", "to the dashboard: ?'recorded'?"])
    failed = run("--parity-set", "sharpness=1.5", *workers)
    failed.stdout.fnmatch_lines(["to the dashboard: ?'failed'?"])
    lines = (project.path / "hooks.txt").read_text().splitlines()
    assert lines == ["recorded test_chain '' .safetensors pass", "judged test_chain '' fail"]


def test_without_hooks_nothing_is_added(project, run_inner):
    assert "dashboard" not in run_inner("--update-golden").stdout.str()
