"""A server as an engine: every request is a completion over HTTP, every pin is read back as far as the server tells."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Final

from ...errors import EngineError, IncomparableError
from ...notes import Note
from ...spec import EngineSpec
from ...spec.engine_arguments import is_secret
from ...spec.server_settings import SERVER, server_settings
from ..backend import Completion, Request, ResolvedConfig
from ..vllm.kept_reader import numbered, take_kept
from .client import Client, DownError
from .kept import ask_kept, kept_route
from .readback import name_of, read_server
from .wire import completion_of, largest_answer, post_of

#: Parts of the digests of a model that make two of them different models.
_PARTS: Final = ("model", "tokenizer", "chat_template")


class ServerBackend:
    """A vLLM behind a server. Nothing starts and nothing ends with it; `digests` are the server's, {} where it tells none."""

    def __init__(self, spec: EngineSpec, client: Client, digests: Mapping[str, str] | None) -> None:
        """Read a server back. `digests` are those of the model that is asked for, None where only the server has it.

        Raises EngineError for one that is down and for a pin that is not the server's, IncomparableError for another model.
        """
        from ..vllm.start import check_settings

        check_settings(spec)
        self._client = client
        self._settings = server_settings(spec.settings)
        try:
            told = read_server(client, spec, self._settings)
        except DownError as error:
            raise EngineError(f"{error}; start one: {start_command(spec)}") from None
        self._served, self._names = told.served, told.names | {told.served}
        self.digests = told.digests
        if digests is not None and told.digests:
            self._check_model(spec, digests)
        if told.model and PurePath(told.model).name != PurePath(spec.model).name and self._settings.served_model is None:
            raise IncomparableError(  # two checkpoints of a run have equal digests: of configuration, shapes and index
                f"the server at {client.url} has the model {told.model!r}, the test asks for {spec.model!r}; if that is "
                f"another name for the same weights, say served_model={told.served!r}"
            )
        values = {**told.values, "concurrency": self._settings.concurrency}
        self._retried: list[str] = []
        self._kept_by: str | None = None
        client.take_retried()
        self.config = ResolvedConfig(
            engine=SERVER,
            version=told.version,
            dtype=str(values.get("dtype") or ("unknown" if spec.dtype == "auto" else spec.dtype)),
            values=values,
            unverified=told.unverified,
            forcing=told.forcing,
            unforced=told.unforced,
            hardware=told.hardware,
            libraries=told.libraries,
            vocabulary=told.vocabulary,
        )

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """See Backend.run; at most `concurrency` requests are under way at a time."""
        numbers = self._numbered(requests)
        posts = [
            post_of(request, self.config.forcing, self._served, number)
            for request, number in zip(requests, numbers, strict=True)
        ]
        name = name_of(self._client, self.config.version)
        largest = max((largest_answer(request) for request in requests), default=0)

        def read(number: int, content: Any) -> Completion:
            try:
                return completion_of(requests[number], content, self.config.max_model_len, self.config.vocabulary, self._names)
            except EngineError as error:
                raise EngineError(f"{error.reason} (request {number + 1} of {len(requests)})", name) from None

        again = ""
        try:
            completions = self._client.post_all(posts, read, self._settings, largest)
        except DownError as error:
            raise EngineError(str(error)) from None
        finally:
            if again := self._client.take_retried():
                self._retried.append(again)
        kept = take_kept(numbers, functools.partial(ask_kept, self._client, self._kept_by or ""))
        if again:  # a request that ran twice at a time may have written over itself
            kept = {}
        return [
            dataclasses.replace(completion, kept=sets.first(len(completion.token_ids)))
            if (sets := kept.get(number)) is not None
            else completion
            for number, completion in zip(numbers, completions, strict=True)
        ]

    def _numbered(self, requests: Sequence[Request]) -> list[int | None]:
        """A number for each request of which the server's worker can tell what truncation kept; None for the others."""
        numbers = numbered(requests, self.config)
        if any(number is not None for number in numbers):
            self._kept_by = kept_route(self._client) if self._kept_by is None else self._kept_by
        return numbers if self._kept_by else [None] * len(requests)

    def remarks(self) -> list[Note]:
        """What there was to say of its answers since it was last asked: requests that had to be sent again."""
        told, self._retried = self._retried, []
        text = f"requests sent again: {'; '.join(told)} ({self._client.url})"
        return [Note("sent_again", text)] if told else []

    def close(self) -> None:
        """Close the connections; the server stays as it is."""
        self._client.close()

    def _check_model(self, spec: EngineSpec, digests: Mapping[str, str]) -> None:
        for part in _PARTS:
            if self.digests.get(part) != digests.get(part):
                raise IncomparableError(
                    f"the server at {self._client.url} has another {part.replace('_', ' ')}: {self._served} "
                    f"({self.digests.get(part)}), the test asks for {spec.model} ({digests.get(part)})"
                )


def start_command(spec: EngineSpec) -> str:
    """The command that starts a server as `spec` asks for."""
    port = server_settings(spec.settings).url.rpartition(":")[2]
    parts = ["logprob-parity serve", spec.model]
    parts += [f"{name}={'...' if is_secret(name) else value}" for name, value in spec.claims().items()]
    parts += [] if spec.profile in ("rl", "own") else [f"--profile {spec.profile}"]
    parts += [] if spec.dtype == "auto" else [f"--dtype {spec.dtype}"]
    parts += [f"--port {port}"] if port.isdecimal() else []
    return " ".join(parts)
