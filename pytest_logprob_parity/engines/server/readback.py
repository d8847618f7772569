"""What a started server says of itself: by our own route, by vLLM's of its development mode, or nearly nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any, Final

from ..._version import __version__
from ...errors import EngineError, UsageError
from ...json_shape import Number, OptionalKey, OrNull, Shape, check_shape
from ...spec import EngineSpec
from ...spec.engine_arguments import is_secret
from ...spec.server_settings import ServerSettings
from ...trace import Forcing
from ..readback import check_readback, forcing_of, json_value
from ..vllm import forced_decode
from ..vllm.config import SHOWN, settings_of, why_not_forced
from .answer import Answer, shown
from .client import Client, DownError

#: Where the middleware answers.
ROUTE: Final = "/logprob_parity/config"
#: Where it says what truncation kept of requests.
KEPT_ROUTE: Final = "/logprob_parity/kept"
EXTENSION: Final = forced_decode.EXTENSION
MIDDLEWARE: Final = "pytest_logprob_parity.engines.server.middleware.ParityMiddleware"

#: What vLLM's development mode tells, but in other words than its own objects do.
_TOLD_OTHERWISE: Final = ("attention_backend", "compilation_mode", "cudagraph_mode")
#: The shape of what our route tells to this version of the client.
_TOLD: Final[Mapping[str, Shape]] = {
    "version": str,
    "cpu": bool,
    "served": str,
    "model": {"name": str},
    "values": {"max_model_len": OptionalKey(OrNull(int))},
    "forcing": str,
    "unverified": [str],
    "refused": str,
    "hardware": OptionalKey(OrNull(dict)),
    "libraries": OptionalKey(OrNull(dict)),
    "vocabulary": OptionalKey(OrNull(Number(1, whole=True))),
}
#: Logprobs of one position at T=1 and T=2 that are further apart than this (nats) are processed ones.
_MOVED: Final = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a server tells. `served` is what it calls its model, `names` are others that it may answer with, `model` is what it
    was started with, `digests` are that model's ({} where it tells none), `vocabulary` is how many token ids it takes.
    """

    version: str
    served: str
    values: Mapping[str, Any]
    forcing: Forcing | None
    unforced: str
    unverified: tuple[str, ...]
    model: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    vocabulary: int | None = None


def read_server(client: Client, spec: EngineSpec, settings: ServerSettings) -> Told:
    """Ask a server for everything that `spec` pins. Profile `own` pins nothing.

    Raises EngineError naming a pin that the server's engine did not take, UsageError for a server of another model.
    """
    answer = client.ask("GET", ROUTE)
    if answer.status == 200 and isinstance(answer.content, Mapping) and "logprob_parity" in answer.content:
        return _by_our_route(client, spec, settings, answer.content)
    if answer.status in (401, 403):
        client.success(answer, ROUTE)
    return _by_its_own(client, spec, settings)


def served_root(client: Client) -> str:
    """The model folder or hub id that a server was started with. Raises EngineError."""
    try:
        return str(_model(_get(client, "/v1/models"), client).get("root") or "")
    except DownError as error:
        raise EngineError(f"{error}; start one: logprob-parity serve MODEL") from None


def name_of(client: Client, version: str) -> str:
    """How messages call a server."""
    return f"vllm {version} at {client.url}"


def _pins(spec: EngineSpec, *, cpu: bool) -> dict[str, Any]:
    return dict(spec.claims()) if spec.profile == "own" else spec.pins(cpu=cpu)


def _checked(client: Client, told: Any, names: Iterable[str]) -> Mapping[str, Any]:
    """What our route told, where it is as this version writes it. Raises EngineError naming what is not."""
    version = told.get("logprob_parity", "of unknown version") if isinstance(told, Mapping) else "of unknown version"
    there = version[:40] if isinstance(version, str) else shown(version)[:40]
    check_shape(
        told,
        {name: _TOLD[name] for name in names},
        f"the server at {client.url} tells something else at {ROUTE} than is read here",
        error=EngineError,
        advice=f"pytest-logprob-parity is {there} there, {__version__} here: install the same version on both sides",
    )
    about: Mapping[str, Any] = told
    return about


def _by_our_route(client: Client, spec: EngineSpec, settings: ServerSettings, about: Mapping[str, Any]) -> Told:
    first = _checked(client, about, ("cpu", "version"))
    asked, name = _pins(spec, cpu=bool(first["cpu"])), name_of(client, str(first["version"]))
    secret = sorted(filter(is_secret, asked))
    asked = {setting: value for setting, value in asked.items() if setting not in secret}
    told = _checked(client, client.success(client.ask("POST", ROUTE, {"asked": asked, "name": name}), ROUTE), _TOLD)
    digests = told["model"].get("digests")
    if told["refused"]:
        raise EngineError(str(told["refused"]))
    forcing, unforced = forcing_of(str(told["forcing"]))
    return Told(
        version=str(told["version"]),
        served=settings.served_model or str(told["served"]),
        values=told["values"],
        forcing=forcing,
        unforced=unforced,
        unverified=(*told["unverified"], *secret),
        model=str(told["model"]["name"]),
        digests=digests if isinstance(digests, Mapping) else {},
        hardware=told.get("hardware") or {},
        libraries=told.get("libraries") or {},
        names=frozenset({str(told["served"])}),
        vocabulary=told.get("vocabulary"),
    )


def _by_its_own(client: Client, spec: EngineSpec, settings: ServerSettings) -> Told:
    models = _get(client, "/v1/models")
    model = _model(models, client)
    served = _served(models, model, spec, settings, client)
    version = client.ask("GET", "/version")
    known = version.content.get("version") if isinstance(version.content, Mapping) else None
    number = str(known or "of unknown version")
    development = client.ask("GET", "/server_info?config_format=json")
    how = _cannot_force()
    config, told = None, None
    if development.status == 200 and isinstance(development.content, Mapping) and "vllm_config" in development.content:
        config = _namespace(development.content["vllm_config"])
        told = _of_development(config, spec)
    if told is None:
        told = _pins(spec, cpu=False), {}
    else:
        how = why_not_forced(config, told[1]) or _install(client) or how
    asked, values = told
    if isinstance(length := model.get("max_model_len"), int) and length > 0:
        values["max_model_len"] = length
    if "logprobs_mode" not in values and (mode := measured_logprobs_mode(client, served)) is not None:
        values["logprobs_mode"] = mode
    unverified = check_readback(asked, values, name_of(client, number))
    values = {name: json_value(value) for name, value in values.items()}
    forcing, unforced = forcing_of(how)
    return Told(
        version=number,
        served=served,
        values=values,
        forcing=forcing,
        unforced=unforced,
        unverified=("the model's digest", *unverified),
        names=_aliases(models, served),
    )


def _of_development(config: Any, spec: EngineSpec) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The pins, and what vLLM's development mode tells of its settings; None where that is a text, as early versions write it,
    or lacks what VllmConfig has.
    """
    try:
        asked = _pins(spec, cpu=getattr(config.device_config, "device_type", "") == "cpu")
        readable = {k: v for k, v in asked.items() if k != "hf_overrides"}  # the checkpoint's configuration comes as text
        values = settings_of(None, config, readable, None)
    except AttributeError:
        return None
    return asked, {k: v for k, v in values.items() if (k in SHOWN or k in asked) and k not in _TOLD_OTHERWISE}


def _get(client: Client, path: str) -> Any:
    return client.success(client.ask("GET", path), path)


def _model(models: Any, client: Client) -> Mapping[str, Any]:
    """The first base model of a server's list."""
    found = [m for m in _entries(models) if m.get("id") and not m.get("parent")]
    if not found:
        raise EngineError(f"the server at {client.url} names no model at /v1/models: {shown(models)}")
    first: Mapping[str, Any] = found[0]
    return first


def _entries(models: Any) -> list[Mapping[str, Any]]:
    data = models.get("data") if isinstance(models, Mapping) else None
    return [entry for entry in data if isinstance(entry, Mapping)] if isinstance(data, list) else []


def _served(models: Any, model: Mapping[str, Any], spec: EngineSpec, settings: ServerSettings, client: Client) -> str:
    """The name to ask for. Raises UsageError where none of a server's models can be the spec's, by its name."""
    names = [str(m.get("id")) for m in _entries(models)]
    if settings.served_model is not None:
        if settings.served_model not in names:
            raise UsageError(f"the server at {client.url} has no model {settings.served_model!r}: it serves {', '.join(names)}")
        return settings.served_model
    wanted = PurePath(spec.model).name
    for entry in _entries(models):
        if wanted in (PurePath(str(entry.get("root") or "")).name, PurePath(str(entry.get("id"))).name):
            return str(entry["id"])
    raise UsageError(
        f"the server at {client.url} serves {names[0]!r} (root {model.get('root')!r}), the test asks for {spec.model!r}; if "
        f"that is its name for the same model, say served_model={names[0]!r}"
    )


def _aliases(models: Any, served: str) -> frozenset[str]:
    """The names of what is served under `served`: vLLM answers with the first of them, whichever was asked for."""
    roots = {m.get("root") for m in _entries(models) if str(m.get("id")) == served and isinstance(m.get("root"), str)}
    return frozenset(str(m.get("id")) for m in _entries(models) if isinstance(m.get("root"), str) and m.get("root") in roots)


def measured_logprobs_mode(client: Client, served: str) -> str | None:
    """`raw_logprobs` or `processed_logprobs`, by one position asked at two temperatures; None where that tells nothing."""
    answers: list[dict[str, float]] = []
    for temperature in (1.0, 2.0):
        body = {"model": served, "prompt": [1, 2, 3, 4], "max_tokens": 1, "temperature": temperature, "logprobs": 2, "seed": 0,
                "return_tokens_as_token_ids": True}  # fmt: skip
        answer = client.ask("POST", "/v1/completions", body)
        top = _first_top(answer)
        if top is None:
            return None
        answers.append(top)
    both = [name for name in answers[0] if name in answers[1]]
    moves = [abs(answers[0][name] - answers[1][name]) for name in both]
    if not moves:
        return None
    if max(moves) > _MOVED:
        return "processed_logprobs"
    # A model that is sure of itself, or knows nothing, has logprobs that hardly move with the temperature either.
    first, second = (*sorted(answers[0].values(), reverse=True), -0.0)[:2]
    return "raw_logprobs" if first - second > 10 * _MOVED and first < -10 * _MOVED else None


def _first_top(answer: Answer) -> dict[str, float] | None:
    try:
        top = answer.content["choices"][0]["logprobs"]["top_logprobs"][0]
        return {str(name): float(value) for name, value in top.items()}
    except (TypeError, KeyError, IndexError, ValueError, AttributeError, OverflowError):
        return None


def _install(client: Client) -> str | None:
    """Have the worker extension wrap the sampler, where a server in development mode has it: how tokens are forced then."""
    answer = client.ask("POST", "/collective_rpc", {"method": "logprob_parity_install"})
    results = answer.content.get("results") if isinstance(answer.content, Mapping) else None
    return str(results[0]) if answer.status == 200 and isinstance(results, list) and results else None


def _cannot_force() -> str:
    return (
        "this server cannot force tokens: start it with `logprob-parity serve MODEL`, or give `vllm serve` "
        f"--worker-extension-cls {EXTENSION} --middleware {MIDDLEWARE}, or, on GPUs, enable_trace_replay"
    )


def _namespace(value: Any) -> Any:
    """JSON as objects with attributes, as vLLM's configuration has them."""
    if isinstance(value, Mapping):
        return SimpleNamespace(**{str(name): _namespace(item) for name, item in value.items()})
    return value
