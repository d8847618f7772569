"""From where two fingerprints differ to what may be the cause: any difference is a suspect, one that cannot matter is none."""

import pytest

from pytest_logprob_parity.comparison.suspected_causes import suspect_settings, suspects
from pytest_logprob_parity.golden.fingerprint import differences


def prints(name="models/m", model="d1", **config):
    return {"name": name, "model": model, "engine": {"kind": "vllm", "version": "0.32.0"}, "config": config}


@pytest.mark.parametrize(
    "setting", [{"num_gpu_blocks_override": 40}, {"disable_sliding_window": True}, {"disable_cascade_attn": True}], ids=str
)
def test_a_setting_in_no_table_is_a_suspect_and_no_named_cause(setting):
    (found,) = suspects(differences(prints(), prints(**setting)))
    assert (found.layer, found.cause, found.candidates) == ("path", None, ("engine_build",))
    assert next(iter(setting)) in found.evidence


def test_a_setting_that_another_version_does_not_have_is_none():
    older = prints() | {"engine": {"kind": "vllm", "version": "0.18.1"}}
    (found,) = suspects(differences(older, prints(disable_cascade_attn=True)))
    assert (found.cause, "disable_cascade_attn" in found.evidence) == ("engine_build", False)


def test_an_override_with_null_is_not_the_absence_of_one():
    apart = differences(prints(), prints(hf_overrides={"sliding_window": None}))
    assert apart == [("config.hf_overrides.sliding_window", "not overridden", None)]
    assert suspects(apart)[0].layer == "weights"
    assert not differences(prints(hf_overrides={"sliding_window": None}), prints(hf_overrides={"sliding_window": None}))


@pytest.mark.parametrize(
    ("now", "apart"),
    [({"name": "m"}, []), ({"name": "elsewhere/models/m"}, []), ({"name": "models/m-step2"}, ["name"]),
     ({"name": "m", "model": "d2"}, ["model", "name"])],
    ids=str,
)  # fmt: skip
def test_one_model_under_another_path_is_no_difference_and_another_name_is_one(now, apart):
    """Digests do not read the weights: two steps of a run have the same."""
    assert [name for name, _, _ in differences(prints(), prints(**now))] == apart


def test_the_fingerprints_agree_is_said_only_where_they_do():
    (found,) = suspects([])
    assert found.evidence.startswith("the fingerprints match")
    (found,) = suspects(differences(prints(), prints(block_size=16)))
    assert (found.layer, found.evidence.startswith("the fingerprints match")) == ("path", False)


def test_equal_fingerprints_do_not_say_weights():
    """How an engine computes and what weights it has are not told apart; what could be stale after an update is a candidate."""
    (found,) = suspects([])
    assert (found.cause, found.candidates[0], "weights_differ" in found.candidates) == (None, "engine_build", True)
    cached = {"config": {"enable_prefix_caching": True}, "adapter": "step-1"}
    (found,) = suspects([], cached, updated=True)
    assert {"stale_kv_cache", "adapter"} <= set(found.candidates)
    (found,) = suspects([], cached)
    assert "stale_kv_cache" not in found.candidates


def test_beside_what_the_trace_tells_a_setting_is_a_candidate_and_no_named_cause():
    (finding,) = suspect_settings([("config.enable_prefix_caching", False, True)], name=False)
    assert (finding.layer, finding.cause, finding.candidates) == ("path", None, ("prefix_cache",))
    assert suspect_settings([], name=False) == []
