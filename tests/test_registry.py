"""Frameworks and profiles that another distribution adds by entry points."""

import subprocess
import sys
from pathlib import Path

import pytest

from pytest_logprob_parity import EngineSpec, Sampling, Trace, UsageError
from pytest_logprob_parity.registry import OWN_ENTRIES
from pytest_logprob_parity.spec import PROFILES
from pytest_logprob_parity.trainer.frameworks import FRAMEWORKS, framework

MODULE = """
import math

from pytest_logprob_parity.errors import EngineError
from pytest_logprob_parity.trainer.frameworks.base import Framework, gather_minus_logsumexp
from pytest_logprob_parity.trainer.frameworks.batches import Batch


def logprobs(logits, token_ids, temperature):
    return gather_minus_logsumexp(logits.float() / temperature, token_ids)


def installed():
    raise EngineError("nothing to install")


def metrics(pairs):
    return {"mine/kl": float((-pairs.d).mean())}


def read(batch, *, sampling=None, tokenizer=None, **labels):
    given = Batch("mine", batch)
    rows = zip(given.ids("prompts"), given.ids("tokens"), given.column("logprobs"))
    sequences = [dict(prompt_token_ids=p, token_ids=t, logprobs=l) for p, t, l in rows]
    return given.trace(sequences, sampling=sampling, tokenizer=tokenizer, labels=labels)


MINE = Framework(
    name="mine", title="Mine", package="", logprobs=logprobs, metrics=metrics, read=read, installed=installed, profile="mine",
    thresholds={"mine/kl": (0.0, 0.01)}, tolerance={"mean_diff": math.log(2)},
)
"""
ENTRY_POINTS = """
[logprob_parity.frameworks]
mine = mine_parity:MINE
broken = mine_no_such_module:MINE
other = mine_profiles:MINE

[logprob_parity.profiles]
mine = mine_profiles:MINE
"""


def distribution(folder, name, entry_points, **modules):
    """A distribution, as an installer leaves it in `folder`."""
    information = folder / f"{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(entry_points)
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)


@pytest.fixture
def mine(tmp_path_factory, monkeypatch):
    """A distribution that adds a framework and a profile."""
    folder = tmp_path_factory.mktemp("site")
    distribution(folder, "mine", ENTRY_POINTS, mine_parity=MODULE, mine_profiles='MINE = {"enable_prefix_caching": False}')
    monkeypatch.syspath_prepend(folder)
    yield folder
    for module in ("mine_parity", "mine_profiles"):
        sys.modules.pop(module, None)


def test_a_framework_of_another_distribution_is_found_by_its_name(mine):
    found = framework("mine")
    assert found.title == "Mine"
    batch = {"prompts": [[1, 2]] * 8, "tokens": [[3, 4, 5]] * 8, "logprobs": [[-0.5, -0.25, -0.125]] * 8}
    rollouts = found.read(batch, sampling=Sampling(temperature=1.0))
    assert isinstance(rollouts, Trace)
    assert found.log(rollouts, rollouts).metrics == {"mine/kl": 0.0}
    assert list(FRAMEWORKS)[: len(OWN_ENTRIES[FRAMEWORKS.group])] == list(OWN_ENTRIES[FRAMEWORKS.group])
    assert "mine" in FRAMEWORKS


def test_without_the_distribution_the_framework_is_unknown():
    assert "mine" not in FRAMEWORKS
    with pytest.raises(UsageError, match="no framework 'mine'"):
        framework("mine")


def test_an_unknown_name_lists_those_of_other_distributions(mine):
    with pytest.raises(UsageError, match=r"no framework 'mime', did you mean 'mine'\?; known are trl, .*, mine") as refused:
        framework("mime")
    assert all(name in refused.value.reason for name in FRAMEWORKS)


def test_the_option_takes_a_framework_of_another_distribution(mine, pytester, run_inner):
    pytester.makepyfile(
        """
        from pytest_logprob_parity import Trace

        def test_rollouts(golden_trace):
            sequences = [
                dict(prompt_token_ids=[1, n], token_ids=[*range(3, 43)], logprobs=[-0.5 - 0.01 * i for i in range(40)])
                for n in range(30)
            ]
            golden_trace.check(Trace.from_sequences(sequences, dtype="float32"))
        """
    )
    run_inner("--update-golden").assert_outcomes(passed=1)
    checked = run_inner("--parity-metrics", "mine")
    checked.assert_outcomes(passed=1)
    checked.stdout.fnmatch_lines(["*mine: mine/kl 0"])
    refused = pytester.runpytest_inprocess("--parity-metrics=mime")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["*--parity-metrics: invalid choice: 'mime' (choose from *trl*, *mine*"])


def test_a_profile_of_another_distribution_pins_its_settings(mine):
    assert EngineSpec("models/any", profile="mine").pins(cpu=False) == {"enable_prefix_caching": False, "seed": 0}
    with pytest.raises(UsageError, match="did you mean 'mine'"):
        EngineSpec("models/any", profile="mime")


def test_names_are_listed_without_an_import(mine):
    """In a process of its own: neither the plugin nor the lists of names import what they name, or anything heavy."""
    code = (
        "import sys, pytest_logprob_parity.plugin\n"
        "from pytest_logprob_parity.spec import PROFILES\n"
        "from pytest_logprob_parity.trainer.frameworks import FRAMEWORKS\n"
        "assert {'mine', 'broken', 'verl'} <= {*FRAMEWORKS} and 'mine' in FRAMEWORKS and {'mine', 'verl'} <= {*PROFILES}\n"
        "PROFILES['verl'], PROFILES['mine']\n"
        "heavy = ('torch', 'numpy', 'vllm', 'transformers', 'safetensors', 'mine_parity')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    path = [str(mine), str(Path(__file__).resolve().parent.parent)]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_an_entry_that_does_not_import_or_is_something_else_is_refused_with_its_place(mine):
    with pytest.raises(UsageError, match=r"framework 'broken'.* mine_no_such_module:MINE, cannot be imported: ModuleNotFound"):
        framework("broken")
    with pytest.raises(UsageError, match=r"framework 'other'.* mine_profiles:MINE, is a dict: expected a framework"):
        framework("other")


def test_a_name_that_two_distributions_register_is_refused(mine, tmp_path, monkeypatch):
    distribution(tmp_path, "yours", "[logprob_parity.frameworks]\nmine = your_parity:MINE\nverl = your_parity:VERL\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="framework 'mine' is registered more than once, as mine_parity:MINE and your_parity"):
        framework("mine")
    assert list(FRAMEWORKS).count("mine") == 1
    assert framework("verl").title == "veRL"  # a name of this package is this package's


@pytest.mark.parametrize("registry", [FRAMEWORKS, PROFILES], ids=lambda registry: registry.kind)
def test_every_entry_of_this_package_is_there(registry):
    for name in OWN_ENTRIES[registry.group]:
        assert registry[name]
