"""The page: results.json as one self-contained HTML file. What a model or a file said is shown and never obeyed."""

from __future__ import annotations

import base64
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, Final

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from ..comparison.findings import LAYERS
from ..comparison.free_generation.result import in_words
from ..grammar import counted
from ..visible_text import visible, visible_token
from .charts import Chart, charts_of, history_charts
from .outcomes import IN_WORDS, OUTCOMES, counts_of
from .titles import cause_of, title_of

_PAGE: Final = "page.html"
_CHART: Final = "charts.svg.jinja"
#: Steps of a token's colour, as shares of the |d| that counts as an outlier.
_STEPS: Final = (0.02, 0.1, 0.3, 1.0)
#: That |d| in nats, where no gate names one.
_OUTLIER: Final = 0.5
#: Checks whose charts are drawn, the worst ones: the charts of a check are about 20 kB.
_DRAWN: Final = 400
_STATES: Final = {"masked": "masked", "not compared": "uncompared", "no number": "lost", "excluded": "lost"}


def render_page(content: Mapping[str, Any]) -> str:
    """The HTML of the content of a results.json, which `read_results` or `make_results` gave."""
    script, style = _own_file("page.js"), _own_file("page.css")
    checks = [_check(check, index) for index, check in enumerate(content["checks"])]
    return _environment().get_template(_PAGE).render(
        title=_title(content),
        project=content["project"],
        created=content["created"],
        version=content["version"],
        counts=counts_of(content),
        words=IN_WORDS,
        choices=_choices(checks),
        checks=checks,
        number_of_checks=counted(len(checks), "checks"),
        unused=content["unused"],
        style=Markup(style),  # our own file
        script=Markup(script),  # our own file
        script_hash=Markup("sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()),
    )  # fmt: skip


def _own_file(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


@functools.cache
def _environment() -> Environment:
    templates = DictLoader({name: _own_file(name) for name in (_PAGE, _CHART)})
    environment = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, finalize=_finalize, trim_blocks=True
    )
    environment.filters |= {"number": _number, "plain": _plain}
    return environment


def _finalize(value: Any) -> Any:
    """Everything that is put into the page passes here; only what we made ourselves (Markup) stays as it is."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _title(content: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count} {IN_WORDS[outcome]}" for outcome, count in counts_of(content).items())
    return f"Logprob parity: {counts or 'no checks'}"


def _choices(checks: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    found = {layer for check in checks for layer in check["layers"]}
    return {
        "layer": [*(layer for layer in LAYERS if layer in found), *sorted(found - set(LAYERS))],
        "cause": sorted({cause for check in checks for cause in check["causes"]}),
        "file": sorted({check["file"] for check in checks if check["file"]}),
    }


def _check(check: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A check with what the template needs besides."""
    title, cause = title_of(check), cause_of(check)
    causes = {c for f in check["findings"] for c in (*f["candidates"], f["cause"]) if c}
    words = " ".join([title, check["headline"], cause, check["golden"]["path"], *(f["evidence"] for f in check["findings"])])
    texts = {token: visible_token(text) for token, text in check["token_texts"].items()}
    unit = check["outlier"] or _OUTLIER
    return {
        **check,
        "outcome": check["outcome"] if check["outcome"] in OUTCOMES else "usage",
        "title": title,
        "cause": cause,
        "layers": sorted({f["layer"] for f in check["findings"]}),
        "causes": sorted(causes),
        "search": words.lower(),
        "free": _free_run(check["free_run"]),
        "gates": [_gate(gate) for gate in check["gates"]],
        "texts": texts,
        "sequences": [_sequence(sequence, unit) for sequence in check["sequences"]],
        "legend": _legend(check, unit),
        "charts": _charts(check, f"c{index}") if index < _DRAWN else [],
        "drifts": bool(check.get("history", {}).get("outside")),
        "undrawn": index >= _DRAWN and check["plots"] is not None,
        "data": {"sequences": check["sequences"], "texts": texts},
    }


def _charts(check: Mapping[str, Any], salt: str) -> list[Chart]:
    return [*charts_of(check["plots"], salt), *history_charts(check.get("history"), salt)]


def _gate(gate: Mapping[str, Any]) -> dict[str, Any]:
    value, limit = gate["value"], gate["limit"]
    if (errors := gate["errors"]) is not None:
        value, limit = errors["actual"], errors["limit"]
    share = 0.0 if not value else value / limit if limit else math.inf
    tone = {"fail": "over", "unverified": "unsure"}.get(gate["outcome"], "")
    text = "limit 0" if math.isinf(share) else f"{share:.0%}" if share <= 1 else f"{share:.3g} ×"
    told = {"over": "exceeds", "unsure": "inconclusive"}.get(tone, "")
    return {**gate, "tone": tone, "told": told, "share_text": text, "width": f"{_width(share):.4g}"}


def _width(share: float) -> float:
    """How long a bar is, in percent: half at the limit, then a quarter for each power of ten, up to 100 times the limit."""
    return 50 * max(share, 0.0) if share <= 1 else min(50 + 25 * math.log10(share), 100.0)


def _sequence(sequence: Mapping[str, Any], unit: float) -> dict[str, Any]:
    states = sequence["states"]
    kinds = [_STATES.get(states[str(i)], "") if str(i) in states else _kind(d, unit) for i, d in enumerate(sequence["diff"])]
    sizes = [math.inf if k == "lost" else abs(d or 0.0) for k, d in zip(kinds, sequence["diff"], strict=True)]
    shown, length = len(sequence["ids"]), sequence["length"]
    first = sequence["start"]
    about = [f"{length} tokens" if shown == length else f"tokens {first} to {first + shown - 1} of {length}"]
    about += [f"RMS {sequence['rms']:.3g} nats"] if sequence["rms"] is not None else []
    about += [f"max |d| {sequence['max']:.3g}"] if sequence["max"] is not None else []
    worst = max(range(shown), key=lambda i: sizes[i], default=0)
    return {**sequence, "kinds": kinds, "worst": worst, "about": ", ".join(about)}


def _kind(d: float | None, unit: float) -> str:
    if d is None:
        return ""
    step = sum(abs(d) >= share * unit for share in _STEPS)
    return f"{'m' if d > 0 else 'l'}{step}" if step else ""


def _legend(check: Mapping[str, Any], unit: float) -> list[tuple[str, str]]:
    if not any(d is not None for sequence in check["sequences"] for d in sequence["diff"]):
        return [("", "the two columns mean different things: no differences are shown")]
    legend = [
        ("l4", f"less likely now by {unit:.2g} nats or more"),
        ("l2", f"by {_STEPS[1] * unit:.2g}"),
        ("m2", f"likelier now by {_STEPS[1] * unit:.2g}"),
        ("m4", f"by {unit:.2g}"),
    ]
    states = {state for sequence in check["sequences"] for state in sequence["states"].values()}
    legend += [("lost", "excluded by truncation, or no number")] if states & {"excluded", "no number"} else []
    legend += [("masked", "written by the environment")] if "masked" in states else []
    legend += [("uncompared", "not compared")] if "not compared" in states else []
    return legend


def _free_run(free_run: Mapping[str, Any] | None) -> str:
    if free_run is None:
        return ""
    turns, diverged, stops, relabelled = (
        free_run.get(name) or 0 for name in ("turns", "diverged", "stops_changed", "relabelled")
    )
    return in_words(turns, diverged, stops, relabelled, next(iter(free_run.get("first") or ()), ""))


def _number(value: float | None) -> str:
    """As the failure message prints it."""
    return "–" if value is None else f"{value:.4g}"


def _plain(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else repr(value)
