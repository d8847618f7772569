"""The worst sequences of a comparison, token by token: both sides' logprobs, ranks and top-k."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..comparison.alignment import align
from ..comparison.result import Comparison
from ..errors import ParityError
from ..trace import Trace
from .chart_numbers import short

#: How many sequences a check that did not pass shows, and one that passed.
_FAILED, _PASSED = 3, 1
#: Tokens that are shown: of a sequence, around its worst one, and of all of them; tokens of a prompt; places of a top-k.
_TOKENS: Final = 160
_ALL_TOKENS: Final = 192
_PROMPT: Final = 24
_TOP: Final = 5


def worst_sequences(comparison: Comparison) -> list[dict[str, Any]]:
    """The content of `sequences` in results.json: those with lost tokens first, then by RMS; none where no bit moved."""
    expected, actual = comparison.expected, comparison.actual
    if not (comparison.metrics["n_changed"] or comparison.metrics["n_nan"]):
        return []
    rows = align(expected, actual)
    partner = np.full(expected.num_tokens, -1)
    partner[rows.expected] = np.arange(actual.num_tokens)[rows.actual]
    d = np.full(expected.num_tokens, np.nan)
    known = partner >= 0
    with np.errstate(invalid="ignore"):
        d[known] = actual.logprobs[partner[known]].astype(np.float64) - expected.logprobs[known]
    lost = known & ~np.isfinite(d) & ~(np.isneginf(expected.logprobs))
    size = np.where(np.isfinite(d), np.abs(d), 0.0)
    numbers = expected.sequence_of_token
    many = expected.num_sequences
    tokens = np.maximum(np.bincount(numbers[known], minlength=many), 1)
    rms = np.sqrt(np.bincount(numbers, size**2, many) / tokens)
    order = np.lexsort((np.arange(many), -rms, -np.bincount(numbers, lost, many)))
    moved = [i for i in order.tolist() if rms[i] > 0 or lost[slice(*expected.bounds(i))].any()]
    shown = moved[: _PASSED if comparison.passed else _FAILED]
    subtracted = bool(np.isfinite(comparison.metrics["mean_diff"]))
    weight = np.where(lost, np.inf, size)
    sequences: list[dict[str, Any]] = []
    left = _ALL_TOKENS
    for sequence in shown:
        if left > 0:
            width = min(left, _TOKENS)
            sequences.append(
                _sequence(comparison, sequence, partner, d if subtracted else np.full_like(d, np.nan), weight, width)
            )
            left -= len(sequences[-1]["ids"])
    return sequences


def _sequence(comparison: Comparison, sequence: int, partner: Any, d: Any, weight: Any, width: int) -> dict[str, Any]:
    """One sequence, `width` tokens of it at most; `weight` [N] says how bad a token is."""
    expected, actual = comparison.expected, comparison.actual
    first, last = expected.bounds(sequence)
    worst = first + int(np.argmax(weight[first:last]))
    start = min(max(worst - width // 2, first), max(last - width, first))
    places = range(start, min(start + width, last))
    others = [int(partner[place]) for place in places]
    whole = d[first:last][np.isfinite(d[first:last])]
    return {
        "sequence": sequence,
        "group": int(expected.group[sequence]),
        "sample": int(expected.sample[sequence]),
        "start": start - first,
        "length": last - first,
        "rms": short(float(np.sqrt(np.mean(whole**2)))) if len(whole) else None,
        "max": short(float(np.abs(whole).max())) if len(whole) else None,
        "prompt": expected.prompt(sequence)[-_PROMPT:],
        "ids": [int(expected.token_ids[place]) for place in places],
        "golden": [short(float(expected.logprobs[place])) for place in places],
        "now": [short(float(actual.logprobs[other])) if other >= 0 else None for other in others],
        "diff": [short(float(d[place]), 4) for place in places],
        "golden_ranks": [int(expected.ranks[place]) for place in places],
        "now_ranks": [int(actual.ranks[other]) if other >= 0 else 0 for other in others],
        "golden_top": [_top(expected, place) for place in places],
        "now_top": [_top(actual, other) if other >= 0 else [] for other in others],
        "states": _states(expected, actual, places, others),
    }


def _top(trace: Trace, place: int) -> list[float]:
    pairs = zip(trace.top_token_ids[place, :_TOP].tolist(), trace.top_logprobs[place, :_TOP].tolist(), strict=True)
    return [number for token, logprob in pairs if token >= 0 and logprob > -np.inf for number in (token, short(logprob, 4))]


def _states(expected: Trace, actual: Trace, places: Iterable[int], others: Iterable[int]) -> dict[str, str]:
    """Why a token has no number on one side, by its place among those shown."""
    states = {}
    for index, (place, other) in enumerate(zip(places, others, strict=True)):
        if not expected.mask[place]:
            states[str(index)] = "masked"
        elif other < 0:
            states[str(index)] = "not compared"
        elif np.isnan(expected.logprobs[place]) or np.isnan(actual.logprobs[other]) or np.isposinf(actual.logprobs[other]):
            states[str(index)] = "no number"
        elif np.isneginf(expected.logprobs[place]) or np.isneginf(actual.logprobs[other]):
            states[str(index)] = "excluded"
    return states


def texts_of(sequences: Iterable[Mapping[str, Any]], trace: Trace, folder: Path | None) -> dict[str, str]:
    """The texts of the tokens that sequences name: the trace's, else the tokenizer's in `folder`; others keep their ids."""
    ids: set[int] = set()
    for sequence in sequences:
        ids.update(sequence["ids"], sequence["prompt"])
        for top in (*sequence["golden_top"], *sequence["now_top"]):
            ids.update(int(token) for token in top[::2])
    texts = {token: trace.token_texts[token] for token in ids if token in trace.token_texts}
    missing = sorted(ids - set(texts))
    if missing and folder is not None:
        texts |= _decode(missing, folder)
    return {str(token): text for token, text in sorted(texts.items())}


def _decode(ids: list[int], folder: Path) -> dict[int, str]:
    """What the tokenizer of a model folder says; nothing where there is none that can be read."""
    from ..checkpoint.prompts import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except ParityError:
        return {}
    known = [token for token in ids if 0 <= token < len(tokenizer)]
    return dict(zip(known, tokenizer.batch_decode([[token] for token in known]), strict=True))
