"""PipelineRL: an LM head in float32 on both sides; its metrics are means over sequences of means over tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...errors import EngineError
from ...trace import Trace
from .base import Doubles, Framework, Pairs, gather_minus_logsumexp
from .batches import Batch

#: epsilon_low and epsilon_high of its configuration.
CLIP: Final = 0.02
#: The label of a token that is not trained on.
_NO_LABEL: Final = -100


def logprobs(logits: Any, token_ids: Any, temperature: float) -> Any:
    """/ T in the dtype of the logits, which is float32 from its float32 LM head; then x_t - log sum exp x [..., L]."""
    return gather_minus_logsumexp(logits / temperature, token_ids)


def installed() -> Callable[[Any, Any, float], Any]:
    """Raises EngineError: there is no package to install, and no function of its own to call."""
    raise EngineError("PipelineRL's own function is not available: it is on no index, and computes logprobs inside its rl_step")


def metrics(pairs: Pairs) -> dict[str, float]:
    """`rl/*` with new := trainer and old := rollout: sequence means, summed and divided by the number of sequences; a
    sequence without tokens counts as 0. `ess` is over tokens. The clip indicator is that of its token-level ppo.
    """
    if not len(pairs.rollout):
        return {}

    def samples(values: Doubles) -> float:
        return float(pairs.padded(pairs.sequence_means(values)).mean())

    d, ratio = pairs.d, pairs.ratio
    outside = (ratio < 1 - CLIP) | (ratio > 1 + CLIP)
    weights = np.exp(d - d.max())
    return {
        "rl/kl_new_old": samples(ratio - d - 1),
        "rl/ratio_new_old": samples(ratio),
        "rl/mean_abs_log_ratio_new_old": samples(np.abs(d)),
        "rl/clamp_log_ratio_new_old_indicator": samples(outside.astype(float)),
        "rl/new_logprobs": samples(pairs.trainer),
        "rl/old_logprobs": samples(pairs.rollout),
        "rl/ess": float(weights.sum() ** 2 / (weights**2).sum() / len(d)),
    }


def read(records: Any, *, sampling: Any = None, tokenizer: Any = None, **labels: Any) -> Trace:
    """A trace of TrainingText records: objects, mappings, or a .jsonl file of them.

    `input_ids`, prompt and completion; `labels`, as long, -100 on the prompt; `logprobs` of the completion alone. Records of
    a `group_id` and prompt are a group; `metadata["model_version"]` becomes the weight version of all its tokens.
    `new_logprobs`, the trainer's of the completion, become `trainer_logprobs`. `text` is compared with the ids if a tokenizer
    is given: it is the chat template over the completion, which lacks a start token and may end with two end tokens.

    Raises UsageError for labels with gaps, whose logprobs PipelineRL itself puts in the wrong places at the end, and for
    records that are not aligned in another way.
    """
    where = Batch("pipelinerl", {})
    versions = []
    sequences: list[dict[str, Any]] = []
    for index, record in enumerate(_records(records, where)):
        source = Batch("pipelinerl", record)
        sequences.append(_sequence(source, f"record {index}", tokenizer))
        versions.append(_version(source, f"record {index}"))
    if not sequences:
        raise where.refuse("no records")
    have = [index for index, sequence in enumerate(sequences) if "trainer_logprobs" in sequence]
    if have and len(have) != len(sequences):
        lacks = next(index for index, sequence in enumerate(sequences) if "trainer_logprobs" not in sequence)
        raise where.refuse(f"record {have[0]} has new_logprobs and record {lacks} has none")
    if all(version is not None for version in versions):
        for sequence, version in zip(sequences, versions, strict=True):
            sequence["weight_versions"] = np.full(len(sequence["token_ids"]), version)
    return where.trace(sequences, sampling=sampling, tokenizer=tokenizer, labels=labels)


def _sequence(source: Batch, name: str, tokenizer: Any) -> dict[str, Any]:
    """One record, called `name`, as a sequence of Trace.from_sequences."""
    ids, values, first = _aligned(source, name)
    counted = source.get("prompt_tokens")
    if counted and int(counted) != first:
        raise source.refuse(f"{name} has {first} prompt ids, the server counted {int(counted)}: it used another chat template")
    text = source.get("text")
    if text:
        _check_text(source, f"the text of {name}", text, ids.tolist(), tokenizer)
    source.check_row(f"logprobs of {name}", values, np.ones(len(values), bool))
    sequence: dict[str, Any] = {"prompt_token_ids": ids[:first], "token_ids": ids[first:], "logprobs": values}
    if source.get("new_logprobs") is not None:
        own = _column(source, name, "new_logprobs")
        if len(own) != len(values):
            raise source.refuse(f"{name} has {len(own)} new_logprobs and {len(values)} logprobs: one for each label")
        source.check_row(f"new_logprobs of {name}", own, np.ones(len(own), bool))
        sequence["trainer_logprobs"] = own
    if source.get("group_id") is not None:
        sequence["group"] = str(source.get("group_id"))
    return sequence


def _aligned(source: Batch, name: str) -> tuple[Any, Any, int]:
    """The ids and logprobs of a record, and where its completion begins. Raises UsageError for labels that are not those of a
    prompt and a completion after it.
    """
    ids, wanted, values = (_column(source, name, column) for column in ("input_ids", "labels", "logprobs"))
    if len(wanted) != len(ids):
        raise source.refuse(f"{name} has {len(ids)} input_ids and {len(wanted)} labels")
    places = np.flatnonzero(wanted != _NO_LABEL)
    if len(places) != len(values):
        raise source.refuse(f"{name} has {len(values)} logprobs for {len(places)} labels: one for each label that is not -100")
    if not len(places):
        raise source.refuse(f"{name} has only the label -100: no token is trained on")
    if places[-1] + 1 != len(ids) or len(places) != len(ids) - places[0]:
        raise source.refuse(
            f"{name} has -100 inside or after its completion: PipelineRL puts the logprobs at the end of the sequence, beside "
            "other tokens than their own"
        )
    first = int(places[0])
    if not np.array_equal(wanted[first:], ids[first:]):
        raise source.refuse(f"{name} has labels that are not its input_ids: they are shifted, or of another text")
    if not first:
        raise source.refuse(f"{name} has no prompt: its first token cannot have a logprob")
    return ids, values, first


def _records(records: Any, where: Batch) -> Sequence[Any]:
    if not isinstance(records, (str, Path)):
        if not isinstance(records, Iterable):
            raise where.refuse(f"expected records or the path of a .jsonl file, not {type(records).__name__}")
        return list(records)
    found = []
    try:
        lines = Path(records).read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise where.refuse(f"{records} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError:
                raise where.refuse(f"line {number} of {records} is not JSON: the file is damaged or incomplete") from None
    return found


def _check_text(where: Batch, what: str, text: str, ids: list[int], tokenizer: Any) -> None:
    """Refuse a text that the ids do not decode to. At both ends the number of special tokens may differ."""
    if tokenizer is None:
        return
    special = {int(i) for i in tokenizer.all_special_ids}
    inner = list(ids)
    while inner and inner[-1] in special:
        inner.pop()
    if inner and inner[0] == tokenizer.bos_token_id:
        inner.pop(0)
    start = tokenizer.bos_token or ""
    text = text.removeprefix(start) if start else text
    rest = text.removeprefix(tokenizer.decode(inner))
    for token in tokenizer.all_special_tokens:
        rest = rest.replace(token, "")
    if text == rest or rest.strip():
        where.check_text(what, text, ids, tokenizer)


def _column(source: Batch, name: str, column: str) -> Any:
    value = source.get(column)
    if value is None or not len(value):
        raise source.refuse(f"{name} has no {column}")
    if column.endswith("logprobs"):
        return np.array([np.nan if v is None else v for v in value], np.float64)
    array = np.asarray(value)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise source.refuse(f"{name}: {column} are whole numbers, one for each token")
    return array


def _version(source: Batch, name: str) -> int | None:
    metadata = source.get("metadata") or {}
    version = metadata.get("model_version") if hasattr(metadata, "get") else getattr(metadata, "model_version", None)
    try:
        return None if version is None else int(version)
    except (TypeError, ValueError, OverflowError):
        raise source.refuse(f"{name} has model_version {version!r}: a version of the weights is a whole number") from None


PIPELINERL: Final = Framework(
    name="pipelinerl",
    title="PipelineRL",
    package="",
    logprobs=logprobs,
    metrics=metrics,
    read=read,
    installed=installed,
    divides="logits",
    head_dtype="float32",
    # No thresholds: it logs and clips.
    profile="pipelinerl",
    mistakes=(
        "its first V1 run (profile pipelinerl-v1-first): raw logprobs, prefix cache and async scheduling on, a bfloat16 LM "
        "head",
        "labels with -100 inside the completion pass its count check, and their logprobs stand beside other tokens",
        "prompt ids are the actor's, the server makes its own from the same messages: nothing compares them",
        "model_version is that of a rollout's start: updates that arrive inside it are not seen",
        "reference logprobs are raw: at T other than 1 the reference KL is of two temperatures",
    ),
)
