"""The head in a precision of its own: one that fell back without a word, tied weights, and both sides' combinations."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import MODEL
from pytest_logprob_parity import (
    EngineError,
    EngineSpec,
    MismatchError,
    Sampling,
    TransformersScorer,
    assert_trainer_parity,
    assert_updated_equals_cold,
    assert_weight_update,
)
from pytest_logprob_parity.trainer.parity import compare_with_trainer

FLOAT32 = {"hf_overrides": {"head_dtype": "float32"}}
SAMPLING = Sampling(temperature=0.7, max_tokens=32, ignore_eos=True, n=4, seed=1)


# -- fell back without a word ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_this_process")
def test_a_head_that_the_platform_refused_is_found_by_reading_back(pool, monkeypatch):
    """vLLM says so in one warning line and goes on in the model's precision."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "supported_dtypes", [torch.bfloat16])
    told = r"did not take hf_overrides: asked for \{'head_dtype': 'float32'\}, .* uses \{'head_dtype': 'bfloat16'\}"
    with pytest.raises(EngineError, match=told):
        pool.engine(EngineSpec(MODEL, dtype="bfloat16", max_num_seqs=31, **FLOAT32)).generate([[5]])


@pytest.mark.usefixtures("in_this_process")
def test_a_head_that_only_says_so_is_found_by_measuring(pool, monkeypatch):
    """What is read back is the attribute; what computes is another matter."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    def half(self, lm_head, hidden_states, embedding_bias):
        return torch.nn.functional.linear(hidden_states, lm_head.weight, embedding_bias).float()

    monkeypatch.setattr(LogitsProcessor, "_apply_head", half)
    with pytest.raises(EngineError, match="asked for a head in float32 and says that it has one, but its logits lie on a grid"):
        pool.engine(EngineSpec(MODEL, dtype="bfloat16", max_num_seqs=30, **FLOAT32)).generate([[5]])


# -- tied to the embeddings ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """Two checkpoints whose head is their embeddings, the second with the head written out besides."""
    folders = []
    for source, written_out in ((MODEL, False), (f"{MODEL}-step2", True)):
        folder = tmp_path_factory.mktemp("models") / "tied"
        shutil.copytree(source, folder)
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"] = tensors.pop("lm_head.weight")
        if written_out:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        folders.append(folder)
    return folders


def test_a_tied_head_in_float32_on_both_sides_and_on_one(pool, tied, questions):
    engine = pool.engine(EngineSpec(str(tied[0]), dtype="bfloat16", **FLOAT32))
    assert engine.config.values["head_dtype"] == "float32"
    rollouts = engine.generate(questions(16), SAMPLING)
    both = TransformersScorer(tied[0], dtype="bfloat16", head_dtype="float32")
    assert both.model.get_input_embeddings().weight.dtype == torch.bfloat16  # the head's copy is its own
    assert not heads_told(assert_trainer_parity(rollouts, both))
    one = TransformersScorer(tied[0], dtype="bfloat16")
    assert heads_told(compare_with_trainer(rollouts, one))


def test_a_stale_copy_of_the_head_is_seen_against_a_fresh_engine_and_not_by_checksums(pool, tied, questions):
    first, second = tied
    engine = pool.engine(EngineSpec(str(second), dtype="float32"))
    with pytest.raises(MismatchError) as error:  # `first` leaves its head out
        assert_updated_equals_cold(engine, first, prompts=questions(8), sampling=SAMPLING)
    comparison = error.value.comparison
    assert (comparison.verdict, comparison.findings[0].candidates[0]) == ("fail", "stale_weights")
    assert any(note.key == "checksums" and note.endswith("checksums agree") for note in comparison.notes)


def heads_told(comparison):
    return [note for note in comparison.notes if note.key == "head_precision"]


def test_updates_of_a_tied_model_with_its_head_and_without(pool, tied, questions):
    """vLLM on CPUs keeps a packed copy of the head, and packs it anew where the head itself is loaded. Not where the checkpoint
    leaves it out: the parameters are the new ones, read back equal, and the head computes with the old.
    """
    first, second = tied
    spec = EngineSpec(str(first), dtype="float32")
    engine = pool.engine(spec)
    engine.update_weights(second, clear_cache=True)
    there = engine.generate(questions(8), SAMPLING)
    assert assert_weight_update(there, before=first, after=second, clear_cache=True).metrics["rms_diff"] < 1e-5

    engine.update_weights(first, clear_cache=True)
    without = engine.generate(questions(8), SAMPLING)
    with pytest.raises(MismatchError) as error:
        assert_weight_update(without, before=second, after=first, clear_cache=True)
    (finding,) = error.value.comparison.findings
    assert (finding.layer, finding.cause) == ("weights", "stale_weights")
    assert finding.values["stale_parts"] == ["lm_head"]

    tensors = load_file(first / "model.safetensors")
    engine.update_weights(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, clear_cache=True)
    back = engine.generate(questions(8), SAMPLING)
    assert assert_weight_update(back, before=second, after=first, clear_cache=True).metrics["rms_diff"] < 1e-5
    assert assert_trainer_parity(back, TransformersScorer(first)).metrics["rms_diff"] < 1e-5

    starts = len(pool.starts)
    others = pool.engine(spec).generate(questions(8), SAMPLING)  # others get another start, not another update
    assert len(pool.starts) == starts + 1
    assert assert_trainer_parity(others, TransformersScorer(first)).metrics["rms_diff"] < 1e-5
