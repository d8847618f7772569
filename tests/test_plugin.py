"""pytest manners: marker, options, names, counts, and the same with and without xdist. All on the real engine."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from conftest import MODEL, forked_python, forked_workers

TEST = f"""
import pytest

PROMPTS = ["Ada has 12 apples and buys 30 more. ", "Dan had 40 nuts and lost 7. "]
SAMPLING = dict(temperature=0.7, top_p=0.9, max_tokens=24, n=8, seed=1)

@pytest.mark.logprob_parity(model={MODEL!r}, dtype="bfloat16")
def test_rollouts(parity_engine, golden_trace):
    result = golden_trace.check(parity_engine, prompts=PROMPTS, sampling=SAMPLING)
    assert result.passed and result.metrics["max_abs_diff"] == 0
"""


@pytest.fixture
def recorded(pytester, run_inner, once):
    """A project whose one golden has been recorded, without a noise floor to be quick; gives the golden's path."""
    pytester.makeini("[pytest]\nparity_repeats = 0")
    pytester.makepyfile(test_it=TEST)
    once("recorded by an engine", pytester.path, lambda: run_inner("--update-golden").assert_outcomes(passed=1))
    (golden,) = pytester.path.glob("golden/test_it/*.safetensors")
    return golden


def summary(result):
    """The plugin's own summary line."""
    return [line for line in result.outlines if re.match(r"logprob-parity: \d", line)]


# -- record, check, fail, accept --------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", ["5"])  # the default
def test_record_then_check(pytester, run_inner):
    pytester.makepyfile(test_it=TEST)
    first = run_inner("--update-golden")
    assert summary(first) == ["logprob-parity: 1 recorded"]
    first.stdout.fnmatch_lines(
        [
            "  recorded golden/test_it/test_rollouts-*.safetensors",
            "    noise floor of 5 repeats: *",
            "    reference (transformers float32, 16 sequences): the golden differs from it by RMS * nats, at most * nats",
            "    times: generating * s, noise floor * s, reference * s",
            "    simulated: * of 40 fault-free engines of another version pass with these 2 prompts; *",
        ]
    )
    (golden,) = pytester.path.glob("golden/test_it/*.safetensors")
    before = golden.read_bytes()
    second = run_inner()
    second.assert_outcomes(passed=1)
    assert summary(second) == ["logprob-parity: 1 checked"]
    second.stdout.fnmatch_lines(
        [
            "  pass (same setup, level rl, objective token) golden/test_it/*.safetensors: * logprobs agree bit for bit",
            "    different? no: bit-identical",
            "    shown: 0 of 2 prompts have a sequence with an RMS difference above *. With 95% confidence, at most *",
            "    no check passes, in any setup, with: * or more sequences with an outlier token, or * or more *",
        ]
    )
    assert summary(run_inner("--parity-update=all")) == ["logprob-parity: 1 recorded"]
    assert golden.read_bytes() == before


def test_a_missing_golden_fails_writes_nothing_and_names_the_command(pytester, run_inner):
    pytester.makepyfile(test_it=TEST)
    result = run_inner()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "E*GoldenError: no golden at golden/test_it/test_rollouts-*.safetensors; record it: "
            "pytest test_it.py::test_rollouts --update-golden"
        ]
    )
    assert summary(result) == ["logprob-parity: 1 without a usable golden"]
    assert not (pytester.path / "golden").exists()


def test_raw_logprobs_against_an_rl_golden_fail_and_say_why(pytester, run_inner, recorded):
    before = recorded.read_bytes()
    result = run_inner("--parity-set", "logprobs_mode=raw_logprobs")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "E*MismatchError: fail: The logprobs of the two sides have different meanings: processed (T=0.7, top-p 0.9) in the "
            "golden, raw in this run",
            "E*golden*golden/test_it/test_rollouts-*.safetensors",
            "E*sequence position*golden (rank)*this run (rank)*token and the text before it",
            "E*findings*semantic: raw_vs_processed*",
            "E*generation*all 16 completions have the golden's tokens and stop at the same positions",
            "E*differs*config.logprobs_mode: 'processed_logprobs' in the golden, 'raw_logprobs' in this run",
            "E*to accept*pytest test_it.py::test_rollouts --update-golden --parity-set logprobs_mode=raw_logprobs",
        ]
    )
    assert summary(result) == ["logprob-parity: 1 checked, 1 failed"]
    assert recorded.read_bytes() == before
    obtained = pytester.path / "parity-obtained" / "test_it" / recorded.name
    assert obtained.is_file()
    assert (pytester.path / "parity-obtained" / ".gitignore").read_text() == "*\n"


def test_other_weights_fail_with_numbers_and_the_worst_tokens_and_the_accepting_command_accepts(pytester, run_inner, recorded):
    other = ("--parity-set", f"model={MODEL}-step2")
    result = run_inner(*other)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "E*MismatchError: fail: Logprobs are not close: * (more than * fail*)",
            "E*compared * tokens of 16 sequences*",
            "E*greatest * nats *at sequence * (prompt *, sample *), position *",
            "E*golden to this run*measured*from*to*limit*",
            "E*nucleus flips*<-- exceeds",
            "E*distance to the reference*golden*this run*to*limit*",
            "E*without truncation (d and KL in nats): *KL k1*k3*ESS*",
            "E*findings*weights: weights_differ*",
            f"E*to accept*pytest test_it.py::test_rollouts --update-golden --parity-set model={MODEL}-step2",
        ]
    )
    run_inner("--update-golden", *other).assert_outcomes(passed=1)
    run_inner(*other).assert_outcomes(passed=1)
    run_inner().assert_outcomes(failed=1)


def test_update_missing_and_failed(pytester, run_inner, recorded):
    before = recorded.read_bytes()
    pytester.makepyfile(test_new=TEST)
    assert summary(run_inner("--parity-update=missing")) == ["logprob-parity: 1 recorded, 1 checked"]
    assert recorded.read_bytes() == before
    recorded.write_bytes(before[:-1])
    assert summary(run_inner("--parity-update=failed")) == ["logprob-parity: 1 recorded, 1 checked"]
    assert recorded.read_bytes() == before


# -- golden first -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("Dan had 40", "Dan had 41"), r"belongs to other prompts: prompts\[1\] is 'Dan had 41 nuts.*golden's is 'Dan had 40"),
        ((', "Dan had 40 nuts and lost 7. "', ""), r"belongs to other prompts: it has 2, the test 1"),
        (("top_p=0.9", "top_p=0.8"), r"recorded with top_p=0\.9, the test now samples with top_p=0\.8"),
    ],
)
def test_a_golden_of_something_else_says_so_and_shows_no_numbers(pytester, run_inner, recorded, pool, change, told):
    pytester.makepyfile(test_it=TEST.replace(*change))
    starts = len(pool.starts)
    result = run_inner()
    assert re.search(r"IncomparableError: golden/.*" + told, result.stdout.str().replace("\n", " "))
    assert "measured" not in result.stdout.str()
    assert summary(result) == ["logprob-parity: 1 incomparable"]
    assert len(pool.starts) == starts


def test_another_model_is_incomparable_before_an_engine_starts(pytester, run_inner, recorded, pool, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(MODEL, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    starts = len(pool.starts)
    result = run_inner("--parity-set", f"model={other}")
    result.stdout.fnmatch_lines(["E*IncomparableError: *was recorded with another model: *"])
    assert len(pool.starts) == starts


def test_a_damaged_golden_is_one_line_and_starts_nothing(pytester, run_inner, recorded, pool):
    recorded.write_bytes(recorded.read_bytes()[:-3])
    starts = len(pool.starts)
    result = run_inner()
    result.stdout.fnmatch_lines(["E*GoldenError: *damaged*"])
    assert len([line for line in result.outlines if line.startswith("E ")]) == 1
    assert len(pool.starts) == starts


def test_update_failed_keeps_what_only_looks_damaged(pytester, run_inner, recorded):
    """A pointer of Git LFS or a golden of a newer schema is somebody's data, and no failed check."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"
    for content in (pointer, recorded.read_bytes().replace(rb"\"schema\":2", rb"\"schema\":7")):
        recorded.write_bytes(content)
        run_inner("--parity-update=failed").assert_outcomes(failed=1)
        assert recorded.read_bytes() == content


def test_what_could_never_pass_is_not_recorded(pytester, run_inner):
    trace = "Trace.from_sequences([dict(prompt_token_ids=[1], token_ids=[3, 4], logprobs=[None, float('nan')])])"
    pytester.makepyfile(
        test_it=f"from pytest_logprob_parity import Trace\ndef test_it(golden_trace): golden_trace.check({trace})"
    )
    run_inner("--update-golden").stdout.fnmatch_lines(
        ["E*UsageError: *not recorded: it could never pass: 2 of 2 logprobs are NaN*"]
    )
    assert not (pytester.path / "golden").exists()


def test_a_golden_of_ones_own_rollouts_is_of_the_prompts_and_sampling_it_says(pytester, run_inner):
    pytester.makepyfile(
        test_it="""
        from pytest_logprob_parity import Trace
        TRACE = Trace.from_sequences([dict(prompt_token_ids=[1, 2], token_ids=[3], logprobs=[-0.1])])
        def test_prompts(golden_trace): golden_trace.check(TRACE, prompts=[[7, 8]])
        def test_sampling(golden_trace): golden_trace.check(TRACE, sampling=dict(temperature=0.7))
        """
    )
    run_inner("--update-golden").assert_outcomes(failed=2)
    assert not (pytester.path / "golden").exists()


def test_too_large_to_record(pytester, run_inner, recorded):
    before = recorded.read_bytes()
    pytester.makeini("[pytest]\nparity_repeats = 0\nparity_max_golden_mb = 0.01")
    result = run_inner("--update-golden")
    result.stdout.fnmatch_lines(["E*GoldenError: *parity_max_golden_mb is 0.01*sample fewer prompts*"])
    assert recorded.read_bytes() == before


def test_what_would_be_too_large_is_refused_before_an_engine_starts(pytester, run_inner, pool):
    pytester.makepyfile(test_it=TEST.replace("sampling=SAMPLING", "sampling={**SAMPLING, 'logprobs': 384, 'max_tokens': 9000}"))
    starts = len(pool.starts)
    result = run_inner("--update-golden")
    result.stdout.fnmatch_lines(
        ["E*UsageError: *no engine was started: 2 prompts x 8 samples x 2250 tokens with top-384 would*"]
    )
    assert len(pool.starts) == starts
    assert not (pytester.path / "golden").exists()


def test_an_empty_prompt_list(pytester, run_inner, recorded):
    before = recorded.read_bytes()
    pytester.makepyfile(test_it=TEST.replace("prompts=PROMPTS", "prompts=[]"))
    for arguments in ((), ("--update-golden",)):
        run_inner(*arguments).stdout.fnmatch_lines(["E*UsageError: prompts is empty*"])
    assert recorded.read_bytes() == before


BAD_SETTINGS = {
    "model=models/nowhere": ("UsageError: model 'models/nowhere': no such folder", "1 misused"),
    "max_num_sqs=4": ("UsageError: 'max_num_sqs' is neither", "1 misused"),
    "max_model_len=1000000": ("EngineError: vllm 0.32.0 did not start", "1 engine error"),
    "engine=vlm": ("UsageError: EngineSpec(engine='vlm')", "1 misused"),
}


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_bad_settings_get_one_clear_line_a_count_of_their_own_and_cost_nothing(pytester, run_inner, recorded, setting):
    before = recorded.read_bytes()
    told, counted = BAD_SETTINGS[setting]
    for update in ((), ("--update-golden",)):
        result = run_inner("--parity-set", setting, *update)
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        (line,) = [line for line in result.outlines if line.startswith("E ")]
        assert told in line
        assert summary(result) == [f"logprob-parity: {counted}"]
        assert recorded.read_bytes() == before


def test_an_engine_that_dies_during_an_update_is_one_line_and_costs_nothing(pytester, run_inner, recorded):
    before = recorded.read_bytes()
    pytester.makepyfile(test_it=TEST.replace("PROMPTS = [", "PROMPTS = [list(range(10, 310))] * 8 + ["))
    dying = ("--parity-set", "enable_chunked_prefill=true", "--parity-set", "max_num_batched_tokens=400")
    result = run_inner("--update-golden", *dying)
    (line,) = [line for line in result.outlines if line.startswith("E ")]
    assert re.search(r"EngineError: vllm 0\.32\.0 died at work .*CPU Generator does not use offset", line)
    assert recorded.read_bytes() == before
    pytester.makepyfile(test_it=TEST)
    run_inner(*dying).assert_outcomes(passed=1)  # the next use starts it anew; short prompts come in one piece


def test_a_prompt_longer_than_the_context(pytester, run_inner, recorded):
    before = recorded.read_bytes()
    pytester.makepyfile(test_it=TEST.replace("PROMPTS = [", "PROMPTS = [[7] * 2000, "))
    result = run_inner("--update-golden")
    result.stdout.fnmatch_lines(["E*UsageError: prompts?0? has 2,000 tokens; the engine's context*is 1,024"])
    assert recorded.read_bytes() == before


# -- marker and settings ----------------------------------------------------------------------------------------------


def test_the_marker_is_registered(pytester):
    pytester.runpytest_subprocess("--markers").stdout.fnmatch_lines(["@pytest.mark.logprob_parity(model, dtype, *"])


@pytest.mark.parametrize("arguments", [(), ("-n", "2")])
def test_a_misspelt_setting_is_that_tests_error_with_the_nearest_name(pytester, arguments, run_forked):
    pytester.makepyfile(TEST.replace('dtype="bfloat16"', 'dtpye="bfloat16"') + "\ndef test_other(): pass")
    result = run_forked("-p", "no:cacheprovider", *arguments)
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(["E*UsageError: 'dtpye' is neither*did you mean 'dtype'?"])


@pytest.mark.parametrize("setting", ["profile=[1]", "seed=[1]", "seed=1.5", "revision={}"])
def test_a_setting_of_the_wrong_type_is_that_tests_error(pytester, setting, run_inner):
    pytester.makepyfile(TEST + "\ndef test_other(): pass")
    result = run_inner("--parity-set", setting)
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines([f"E*UsageError: EngineSpec({setting.partition('=')[0]}=*"])


def test_no_model_says_where_to_name_one(pytester, run_inner):
    pytester.makepyfile("def test_it(parity_engine): pass")
    run_inner().stdout.fnmatch_lines(["E*UsageError: no model: mark the test*"])


def test_settings_merge_and_the_nearest_place_wins(pytester, run_inner):
    pytester.makeini("[pytest]\nparity_engine =\n  model=ini\n  max_num_seqs=1\n  block_size=16\n  seed=9")
    pytester.makepyfile(
        """
        import pytest
        pytestmark = pytest.mark.logprob_parity(max_num_seqs=2, dtype="float32", max_model_len=64)

        @pytest.mark.logprob_parity(dtype="float16", gpu_memory_utilization=0.5)
        class Base: pass

        @pytest.mark.logprob_parity(dtype="bfloat16")
        class TestIt(Base):
            @pytest.mark.logprob_parity(model="function")
            @pytest.mark.parametrize("parity_engine", [
                {}, pytest.param({"model": "parameter"}, marks=pytest.mark.logprob_parity(seed=3, model="mark on parameter")),
            ], indirect=True)
            def test_it(self, parity_engine):
                spec = parity_engine.spec
                print("spec:", spec.model, spec.dtype, spec.seed, spec.settings)
        """
    )
    result = run_inner("-s", "--parity-set", "block_size=32")
    settings = "{'block_size': 32, 'gpu_memory_utilization': 0.5, 'max_model_len': 64, 'max_num_seqs': 2}"
    result.stdout.fnmatch_lines([f"*spec: function bfloat16 9 {settings}", f"*spec: parameter bfloat16 3 {settings}"])


def test_parametrised_engines_have_stable_ids_and_goldens_of_their_own(pytester, run_inner):
    parametrize = '@pytest.mark.parametrize("parity_engine", [{"dtype": "float32"}, {"seed": 5}], indirect=True)'
    test = TEST.replace("\ndef test", f"\n{parametrize}\ndef test").replace('dtype="bfloat16"', 'engine="transformers"')
    pytester.makeini("[pytest]\nparity_repeats = 0")
    pytester.makepyfile(test_it=test)
    run_inner("--update-golden").assert_outcomes(passed=2)
    run_inner().assert_outcomes(passed=2)
    names = sorted(p.name.rpartition("-")[0] for p in pytester.path.glob("golden/test_it/*"))
    assert names == ["test_rollouts-dtype=float32", "test_rollouts-seed=5"]


def test_several_checks_in_a_test_have_names(pytester, run_inner):
    check = "golden_trace.check(parity_engine, prompts=PROMPTS, sampling=SAMPLING"
    pytester.makeini("[pytest]\nparity_repeats = 0")
    pytester.makepyfile(test_it=TEST + f"    {check}, name='again')\n")
    assert summary(run_inner("--update-golden")) == ["logprob-parity: 2 recorded"]
    assert summary(run_inner()) == ["logprob-parity: 2 checked"]
    pytester.makepyfile(test_it=TEST + f"    {check})\n")
    run_inner().stdout.fnmatch_lines(["E*UsageError: a second check in one test needs a name*"])


def test_limits_from_the_ini_file_and_the_call(pytester, run_inner, recorded):
    lax = "mean_diff=9, rms_diff=9, clip_share=1, outlier=99, sequence_rms=99, support_flips=1, support_depth=9"
    other = ("--parity-set", f"model={MODEL}-step2")
    pytester.makeini("[pytest]\nparity_tolerance =\n" + "\n".join(f"  bfloat16.{p}" for p in lax.split(", ")))
    pytester.makepyfile(test_it=TEST.replace(' and result.metrics["max_abs_diff"] == 0', ""))
    run_inner(*other).assert_outcomes(passed=1)
    pytester.makepyfile(test_it=TEST.replace("sampling=SAMPLING", "sampling=SAMPLING, tolerance={'rms_diff': 0}"))
    run_inner(*other).assert_outcomes(failed=1)
    pytester.makeini("[pytest]\nparity_tolerance = rms_dif = 3")
    bad = run_inner()
    assert bad.ret == pytest.ExitCode.USAGE_ERROR
    bad.stderr.fnmatch_lines(["*tolerance has no limit 'rms_dif', did you mean 'rms_diff'?*"])


def test_what_fails_is_said_by_the_call_the_option_and_the_ini_file_in_this_order(pytester, run_inner, recorded):
    """Bits that a hair is missing from are a failure at level bitwise only."""
    shifted = "golden_trace.check((t := Trace.load(golden_trace.path())).with_(logprobs=t.logprobs - np.float32(1e-5)), LEVEL)"
    pytester.makepyfile(test_it="import numpy as np\nfrom pytest_logprob_parity import Trace\n"
                        f"def test_rollouts(golden_trace): {shifted.replace(', LEVEL', '')}")  # fmt: skip
    run_inner().assert_outcomes(passed=1)
    result = run_inner("--parity-level=bitwise")
    result.stdout.fnmatch_lines(["E*fail: * of * logprobs are not bit-identical", "E*level*bitwise: fails if any bit differs"])
    pytester.makeini("[pytest]\nparity_level = bitwise")
    run_inner().assert_outcomes(failed=1)
    run_inner("--parity-level=rl").assert_outcomes(passed=1)
    noise = run_inner("--parity-level=noise")
    noise.stdout.fnmatch_lines(["E*unverified: Inconclusive: *the golden has no noise floor*"])
    assert summary(noise) == ["logprob-parity: 1 checked, 1 unverified"]
    source = pytester.path / "test_it.py"
    source.write_text(source.read_text().replace("1e-5))", "1e-5)), level='rl'"))
    run_inner("--parity-level=bitwise").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("parity_level = nose", "parity_level: 'nose' is not one of bitwise, noise, rl"),
        ("parity_repeats = 1", "parity_repeats: '1' must be 2 or more, or 0 for no noise floor"),
        ("parity_call_timeout = -1", "parity_call_timeout: '-1' must be a number of seconds, or 0 for no limit"),
        ("parity_start_timeout = soon", "parity_start_timeout: 'soon' must be a number of seconds, or 0 for no limit"),
        ("parity_repeats = many", "parity_repeats: 'many' must be 2 or more, or 0 for no noise floor"),
        ("parity_golden_dir = parity-obtained", "parity_golden_dir: parity-obtained is where failing checks leave traces: *"),
        ("parity_golden_dir = ./parity-obtained/x", "parity_golden_dir: parity-obtained is where failing checks *"),
    ],
)
def test_ini_values_that_are_none(pytester, line, told, run_inner):
    pytester.makeini(f"[pytest]\n{line}")
    bad = run_inner()
    assert bad.ret == pytest.ExitCode.USAGE_ERROR
    bad.stderr.fnmatch_lines([f"*{told}*"])


def test_ones_own_rollouts_are_source_and_candidate(pytester, run_inner):
    pytester.makepyfile(
        """
        import pytest
        from pytest_logprob_parity import Trace

        def test_mine(golden_trace, shift=0):
            golden_trace.check(Trace.from_sequences(
                [dict(prompt_token_ids=[1, 2], token_ids=[3, 4, 5], logprobs=[-0.1 - shift, -0.2, -0.3], mask=[1, 0, 1])],
                dtype="float32", engine="ours"))
        """
    )
    run_inner("--update-golden").assert_outcomes(passed=1)
    run_inner().assert_outcomes(passed=1)
    source = pytester.path / "test_ones_own_rollouts_are_source_and_candidate.py"
    source.write_text(source.read_text().replace("shift=0", "shift=0.5"))
    run_inner().stdout.fnmatch_lines(["E*fail: Logprobs are not close*"])


OWN_ENGINE = f"""
import os
import pytest

@pytest.fixture(scope="session")
def parity_engine_factory():
    os.environ |= {{"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}}
    from vllm import LLM
    return LLM({MODEL!r}, dtype="bfloat16", enforce_eager=True, enable_prefix_caching=False)
"""


def test_the_users_own_engine(pytester, recorded, run_forked):
    """A conftest hands over an LLM that the repo built; nothing is pinned, and what differs from `rl` is shown. The marker of
    the other test stays, as in the tutorial: the engine is the repo's, the golden is that of the profile.
    """
    pytester.makeconftest(OWN_ENGINE)
    pytester.makepyfile(test_own=TEST.replace(f'@pytest.mark.logprob_parity(model={MODEL!r}, dtype="bfloat16")\n', ""))
    result = run_forked("--parity-update=missing", timeout=300)
    result.assert_outcomes(passed=1, failed=1)
    assert summary(result) == ["logprob-parity: 1 recorded, 1 checked, 1 failed"]
    told = "logprob-parity: own engine, vllm 0.32.0: differs from profile rl: logprobs_mode is 'raw_logprobs' (rl: *"
    result.stdout.fnmatch_lines([told])
    result.stdout.fnmatch_lines(["E*MismatchError: fail: The logprobs of the two sides have different meanings: *"])


def test_the_users_own_engine_passes_against_the_golden_of_the_rl_profile_where_its_logprobs_mean_the_same(
    pytester, recorded, run_forked
):
    pytester.makeconftest(OWN_ENGINE.replace("enforce_eager", "logprobs_mode='processed_logprobs', enforce_eager"))
    run_forked(timeout=300).assert_outcomes(passed=1)


def test_an_own_engine_that_is_none(pytester, run_inner):
    pytester.makeconftest("import pytest\n@pytest.fixture(scope='session')\ndef parity_engine_factory(): return object()")
    pytester.makepyfile(test_it=TEST)
    run_inner().stdout.fnmatch_lines(
        ["E*UsageError: parity_engine_factory must give a vllm.LLM, an AsyncLLM or a server's address, not builtins.object"]
    )


# -- options beside others --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        "parser.addoption('--update-golden', action='store_true', default=False)",
        "parser.addoption('--update-golden', action='store_true', dest='regen', default=False)",
        "parser.addoption('--update-golden', action='store_true')",
    ],
)
@pytest.mark.parametrize("how", ["argument", "addopts"])
def test_beside_a_conftest_that_defines_update_golden(pytester, run_inner, option, how):
    pytester.makeconftest(f"def pytest_addoption(parser):\n    {option}")
    pytester.makepyfile(test_it=TEST)
    if how == "addopts":
        pytester.makeini("[pytest]\nparity_repeats = 0\naddopts = --update-golden")
    else:
        pytester.makeini("[pytest]\nparity_repeats = 0")
    result = run_inner(*(["--update-golden"] if how == "argument" else []))
    assert summary(result) == ["logprob-parity: 1 recorded"]


def test_a_conftests_update_golden_that_is_no_flag_updates_nothing(pytester, run_inner, recorded):
    pytester.makeconftest("def pytest_addoption(parser): parser.addoption('--update-golden', default='never')")
    assert summary(run_inner()) == ["logprob-parity: 1 checked"]


def test_help_and_typos(pytester):
    shown = pytester.runpytest_subprocess("--help").stdout.str()
    assert "--parity-update={all,missing,failed}" in shown
    assert "--update-golden means all" in " ".join(shown.split())
    bad = pytester.runpytest_subprocess("--parity-set", "nonsense")
    assert bad.ret == pytest.ExitCode.USAGE_ERROR
    bad.stderr.fnmatch_lines(["*--parity-set: 'nonsense' is not KEY=VALUE*"])


def test_header_names_engine_and_versions(pytester, run_forked):
    pytester.makepyfile("def test(): pass")
    result = run_forked()
    result.stdout.fnmatch_lines(["logprob-parity: vllm 0.32.0, transformers *, torch *; goldens in golden"])
    assert not summary(result)


# -- selecting, ordering, reporting -----------------------------------------------------------------------------------

THREE = f"""
import pytest
order = []
@pytest.mark.logprob_parity(model={MODEL!r}, dtype="bfloat16")
def test_a1(parity_engine): order.append("a1")
def test_plain(): order.append("plain")
@pytest.mark.logprob_parity(model={MODEL!r}, dtype="float32")
def test_b(parity_engine): order.append("b")
@pytest.mark.logprob_parity(model={MODEL!r}, dtype="bfloat16")
def test_a2(parity_engine): order.append("a2")
"""


def collected(result):
    return [line.partition("::")[2] for line in result.outlines if "::" in line]


def test_tests_of_one_engine_come_together_and_others_keep_their_places(pytester, run_inner):
    pytester.makepyfile(test_it=THREE)
    assert collected(run_inner("--collect-only", "-q")) == ["test_a1", "test_plain", "test_a2", "test_b"]
    assert collected(run_inner("--collect-only", "-q", "-k", "test_b or a2")) == ["test_a2", "test_b"]


def test_stepwise_and_last_failed_find_their_test_again(pytester, run_forked):
    pytester.makepyfile(test_it=THREE.replace('order.append("plain")', "assert 0"))
    first = run_forked("--stepwise")
    first.assert_outcomes(passed=1, failed=1)
    again = run_forked("--stepwise")
    again.assert_outcomes(failed=1, deselected=1)
    run_forked("--lf").assert_outcomes(failed=1)
    run_forked("-x").assert_outcomes(passed=1, failed=1)


def test_unused_goldens_are_named_when_everything_was_collected(pytester, run_inner, recorded):
    pytester.makepyfile(test_it=TEST.replace("test_rollouts", "test_renamed"))
    result = run_inner("--collect-only")
    assert summary(result) == ["logprob-parity: 1 unused golden"]
    result.stdout.fnmatch_lines(["*unused, its test is gone: golden/test_it/test_rollouts-*"])
    assert not summary(run_inner("--collect-only", "test_it.py::test_renamed"))
    assert recorded.exists()


def test_junitxml_carries_a_record_for_each_check(pytester, run_inner, recorded):
    run_inner("--junitxml=out.xml")
    (prop,) = ET.parse(pytester.path / "out.xml").iter("property")
    record = json.loads(prop.get("value"))
    assert (prop.get("name"), record["outcome"], record["metrics"]["max_abs_diff"]) == ("logprob_parity", "passed", 0)
    assert record["golden"].startswith("golden/test_it/test_rollouts-")


def test_two_workers_record_and_check_like_one(pytester, run_inner, run_forked, recorded):
    """Each worker has an engine of its own; the records of both reach the one summary, unused goldens too."""
    pytester.makepyfile(test_gone=TEST)
    run_inner("--parity-update=missing").assert_outcomes(passed=2)
    (pytester.path / "test_gone.py").unlink()
    pytester.makepyfile(test_new=TEST)
    result = run_forked(*forked_workers(2), "--parity-update=missing", timeout=400)
    result.assert_outcomes(passed=2)
    assert summary(result) == ["logprob-parity: 1 recorded, 1 checked, 1 unused golden"]


def test_ctrl_c_during_an_update_leaves_the_golden_and_no_process(pytester, recorded):
    before = recorded.read_bytes()
    slow = TEST.replace("max_tokens=24, n=8", "max_tokens=900, min_tokens=900, n=64")
    pytester.makepyfile(test_it="import os\nprint('its group is', os.getpid())" + slow)
    process = subprocess.Popen(
        [forked_python(), "-m", "pytest", "--update-golden", "-s"],
        cwd=pytester.path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("its group is"):
            group = int(line.split()[-1])
        if "logprob-parity: started" in line:
            break
    time.sleep(2)
    os.killpg(group, signal.SIGINT)
    try:
        rest = process.communicate(timeout=120)[0]
    except subprocess.TimeoutExpired:
        os.killpg(group, signal.SIGKILL)
        raise
    assert process.returncode == pytest.ExitCode.INTERRUPTED, rest[-2000:]
    assert recorded.read_bytes() == before
    assert [p.name for p in recorded.parent.iterdir()] == [recorded.name]
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


def test_twenty_checks_start_as_many_engines_as_there_are_specs(pytester, run_inner, pool):
    """Counted in one process on the real pool: transformers engines, to be quick about it."""
    before = len(pool.starts)
    tests = "\n".join(
        f'@pytest.mark.logprob_parity(model={MODEL!r}, engine="transformers", dtype="float32", max_num_seqs={2 + i % 2})\n'
        f"def test_{i}(parity_engine, golden_trace):\n"
        f"    golden_trace.check(parity_engine, prompts=[[5, 6, 7]], sampling=dict(max_tokens=4, temperature=0))"
        for i in range(20)
    )
    pytester.makeini("[pytest]\nparity_repeats = 0")
    pytester.makepyfile("import pytest\n" + tests)
    run_inner("--update-golden").assert_outcomes(passed=20)
    assert len(pool.starts) - before == 2
    result = run_inner()
    result.assert_outcomes(passed=20)
    result.stdout.fnmatch_lines(["  and 15 more; -v shows all"])
    assert Path(pytester.path / "golden").is_dir()
