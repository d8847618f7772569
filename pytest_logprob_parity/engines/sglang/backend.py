"""An SGLang server as an engine: it is asked for the logprobs of given tokens, and read back as far as it tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Final

from ...checkpoint.digests import vocabulary_of
from ...errors import EngineError, IncomparableError, UsageError
from ...notes import Note
from ...spec import EngineSpec
from ...spec.server_settings import SERVER_SETTINGS, SGLANG, server_settings
from ...suggest import nearest
from ..backend import Completion, Request, ResolvedConfig
from ..readback import check_readback, json_value
from ..server.answer import shown
from ..server.client import Client, DownError
from .wire import completion_of, largest_answer, post_of

#: Settings that can be asked for beside those that say how to reach the server. They are read back from it.
SETTINGS: Final = (
    "enable_prefix_caching", "max_model_len", "quantization", "kv_cache_dtype", "attention_backend",
    "tensor_parallel_size", "data_parallel_size", "enable_deterministic_inference",
)  # fmt: skip
#: Of a profile's pins those that say something of a prefill; the others are of decoding, and nothing is decoded.
_PINS: Final = ("dtype", "enable_prefix_caching")
#: SGLang's names of settings that have the same meaning here.
_SAME: Final[Mapping[str, str]] = {
    "dtype": "dtype",
    "quantization": "quantization",
    "kv_cache_dtype": "kv_cache_dtype",
    "attention_backend": "attention_backend",
    "tp_size": "tensor_parallel_size",
    "dp_size": "data_parallel_size",
    "context_length": "max_model_len",
    "enable_deterministic_inference": "enable_deterministic_inference",
    "max_running_requests": "max_num_seqs",
}
UNFORCED: Final = "SGLang cannot be forced along tokens while it decodes: it scores them in a prefill"


class SglangBackend:
    """An SGLang behind its server. Nothing starts and nothing ends with it."""

    def __init__(self, spec: EngineSpec, client: Client, vocabulary: int | None) -> None:
        """Read a server back; `vocabulary` is how many token ids there are.

        Raises EngineError for one that is down or did not take a pin, IncomparableError for another model.
        """
        self._client = client
        self._settings = server_settings(spec.settings, SGLANG)
        try:
            about, told = self._read("/model_info", "/get_model_info"), self._read("/server_info", "/get_server_info")
        except DownError as error:
            port = self._settings.url.rpartition(":")[2]
            start = f"python -m sglang.launch_server --model-path {spec.model} --port {port} --disable-radix-cache"
            raise EngineError(f"{error}; start one: {start}") from None
        _check_model(spec, about, client.url, self._settings.served_model)
        version = str(told.get("version") or "of unknown version")
        self._name = f"sglang {version} at {client.url}"
        values = _values(told)
        asked = {name: value for name, value in spec.pins(cpu=False).items() if name in _PINS} | spec.claims()
        unverified = check_readback(asked, values, self._name)
        self._retried: list[str] = []
        client.take_retried()
        self.config = ResolvedConfig(
            engine=SGLANG,
            version=version,
            dtype=str(values.get("dtype") or "unknown"),
            values={name: json_value(value) for name, value in {**values, "concurrency": self._settings.concurrency}.items()},
            unverified=("the model's digest", *unverified),
            forcing=None,
            unforced=UNFORCED,
            generates=False,
            libraries={},
            vocabulary=vocabulary,
        )

    @classmethod
    def connect(cls, spec: EngineSpec, model: Path) -> SglangBackend:
        """Connect to the server of `spec`, which has the model of the folder `model`.

        Raises UsageError for a setting that this engine kind does not have, and what reading the server back raises.
        """
        for name in spec.settings:
            if name not in (*SERVER_SETTINGS, *SETTINGS):
                raise UsageError(f"engine='sglang' has no setting {name!r}{nearest(name, (*SERVER_SETTINGS, *SETTINGS))}")
        client = Client(str(spec.settings["url"]), serves="an SGLang server", key="SGLANG_API_KEY")
        return cls(spec, client, vocabulary_of(model))

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """See Backend.run; at most `concurrency` requests are under way at a time. Raises UsageError for other than scoring."""
        if any(request.scored_token_ids is None for request in requests):
            raise UsageError(f"{UNFORCED}; it writes no completions for this plugin either: record with another engine")
        posts = [post_of(request) for request in requests]
        largest = max((largest_answer(request) for request in requests), default=0)

        def read(number: int, content: Any) -> Completion:
            try:
                return completion_of(requests[number], content, self.config.vocabulary)
            except EngineError as error:
                raise EngineError(f"{error.reason} (request {number + 1} of {len(requests)})", self._name) from None

        try:
            return self._client.post_all(posts, read, self._settings, largest)
        except DownError as error:
            raise EngineError(str(error)) from None
        finally:
            if again := self._client.take_retried():
                self._retried.append(again)

    def remarks(self) -> list[Note]:
        """Requests that had to be sent again since this was last asked."""
        told, self._retried = self._retried, []
        return [Note("sent_again", f"requests sent again: {'; '.join(told)} ({self._client.url})")] if told else []

    def close(self) -> None:
        """Close the connections; the server stays as it is."""
        self._client.close()

    def _read(self, path: str, former: str) -> Mapping[str, Any]:
        """What the server tells at `path`, which earlier versions call `former`."""
        answer = self._client.ask("GET", path)
        if answer.status == 404:
            path, answer = former, self._client.ask("GET", former)
        told = self._client.success(answer, path)
        if not isinstance(told, Mapping):
            raise EngineError(f"the server at {self._client.url} tells no table at {path}: {shown(told)}")
        return told


def _check_model(spec: EngineSpec, about: Mapping[str, Any], url: str, served: str | None) -> None:
    """Raise IncomparableError where a server has another model by its name; it tells no digest."""
    there = str(about.get("model_path") or "")
    name = str(about.get("served_model_name") or there)
    if served is not None and served != name:
        raise IncomparableError(f"the server at {url} serves {name!r}, served_model is {served!r}")
    if served is None and there and PurePath(there).name != PurePath(spec.model).name:
        raise IncomparableError(
            f"the server at {url} has the model {there!r}, the test asks for {spec.model!r}; if that is another name for the "
            f"same weights, say served_model={name!r}"
        )


def _values(told: Mapping[str, Any]) -> dict[str, Any]:
    """The server's arguments (server_args.py) under the names of engine arguments here. Input logprobs are always raw."""
    values: dict[str, Any] = {ours: told[theirs] for theirs, ours in _SAME.items() if told.get(theirs) is not None}
    for theirs, ours in (
        ("disable_radix_cache", "enable_prefix_caching"),
        ("disable_overlap_schedule", "async_scheduling"),
    ):
        if isinstance(told.get(theirs), bool):
            values[ours] = not told[theirs]
    size = told.get("chunked_prefill_size")
    if isinstance(size, int):
        values["enable_chunked_prefill"] = size > 0
    return {**values, "logprobs_mode": "raw_logprobs"}
