"""A server as an engine: every request is a completion over HTTP, every pin is read back as far as the server tells."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Final

from ...checkpoint.weight_update import WeightUpdate
from ...errors import EngineError, IncomparableError, UsageError
from ...notes import Note
from ...spec import EngineSpec
from ...spec.engine_arguments import is_secret
from ...spec.server_settings import SERVER, server_settings
from ..backend import Completion, Request, ResolvedConfig
from ..vllm.kept_reader import numbered, take_kept
from . import in_flight
from .client import Client, DownError
from .kept import ask_kept, kept_route
from .readback import name_of, read_server
from .weight_api import AS_STARTED, WeightApi
from .wire import completion_of, generate_post, largest_answer, post_of

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
        self._weights = WeightApi(client, f"{start_command(spec)} --weight-updates", self._settings.timeout)
        #: What the server called its weights when they were last looked at; None where it does not say, or nobody asked.
        self._label = told.weight_version
        self._told: list[Note] = []
        if self._label not in (None, AS_STARTED):
            text = f"the server at {client.url} has taken weight updates: it calls its weights {self._label!r}"
            self._told.append(Note("weight_labels", text))
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
        """See Backend.run; at most `concurrency` requests are under way at a time.

        Raises EngineError, too, where somebody else has updated the server's weights since they were last looked at.
        """
        self._check_label()
        numbers = self._numbered(requests)
        posts = [
            post_of(request, self.config.forcing, self._served, number)
            for request, number in zip(requests, numbers, strict=True)
        ]
        largest = max((largest_answer(request) for request in requests), default=0)
        again = ""
        try:
            completions = self._client.post_all(
                posts, lambda number, content: self._read(requests, number, content), self._settings, largest
            )
        except DownError as error:
            raise EngineError(str(error)) from None
        finally:
            if again := self._client.take_retried():
                self._retried.append(again)
        self._check_label()
        kept = take_kept(numbers, functools.partial(ask_kept, self._client, self._kept_by or ""))
        if again:  # a request that ran twice at a time may have written over itself
            kept = {}
        return [
            dataclasses.replace(completion, kept=sets.first(len(completion.token_ids)))
            if (sets := kept.get(number)) is not None
            else completion
            for number, completion in zip(numbers, completions, strict=True)
        ]

    def _read(self, requests: Sequence[Request], number: int, content: Any) -> Completion:
        try:
            return completion_of(requests[number], content, self.config.max_model_len, self.config.vocabulary, self._names)
        except EngineError as error:
            name = name_of(self._client, self.config.version)
            raise EngineError(f"{error.reason} (request {number + 1} of {len(requests)})", name) from None

    def update_weights(self, update: WeightUpdate) -> None:
        """Have the server load a checkpoint folder, which it must see, while none of our requests runs.

        Raises UsageError for a server without the weight API, and for weights that it refuses; EngineError where loading
        failed, and where the server then calls its weights by another name than it was told.
        """

        async def take() -> tuple[str, str]:
            return await in_flight.take(self._weights, update), await self._weights.label()

        asked, self._label = self._client.drive(take)
        if self._label != asked:
            raise EngineError(
                f"the server at {self._client.url} calls its weights {self._label!r} after an update that named them "
                f"{asked!r}: its labels do not say which weights wrote a token"
            )

    def run_through(self, requests: Sequence[Request], update: WeightUpdate) -> tuple[list[Completion], list[int]]:
        """Answer all requests with an update on the way; also how many tokens of each had come while the engine was paused.

        The completions carry what the server's own labels say of each token. Raises as update_weights, but for the label.
        """
        self._check_label()
        posts = [generate_post(request, self.config.forcing, self._served) for request in requests]
        largest = max((largest_answer(request) for request in requests), default=0)
        through = self._client.drive(
            lambda: in_flight.run_through(self._client, self._weights, posts, largest, update, self._settings)
        )
        self._label = through.labels[1]
        if self._label != through.asked:
            text = f"the server calls its weights {self._label!r} after an update that named them {through.asked!r}"
            self._told.append(Note("weight_labels", text))
        completions = [
            dataclasses.replace(self._read(requests, n, stream.answer), engine_versions=through.claimed(n))
            for n, stream in enumerate(through.streams)
        ]
        if not all(len(completion.token_ids) for completion in completions):
            raise UsageError(f"mode={update.mode!r} before a request had written its first token: nothing came of it")
        return completions, through.before

    def weight_checksums(self) -> dict[str, str]:
        """vLLM's own checksum of each parameter, by /weight_checker; {} of a server that has no such route."""
        return self._client.drive(self._weights.checksums)

    def _numbered(self, requests: Sequence[Request]) -> list[int | None]:
        """A number for each request of which the server's worker can tell what truncation kept; None for the others."""
        numbers = numbered(requests, self.config)
        if any(number is not None for number in numbers):
            self._kept_by = kept_route(self._client) if self._kept_by is None else self._kept_by
        return numbers if self._kept_by else [None] * len(requests)

    def remarks(self) -> list[Note]:
        """What there was to say of its answers since it was last asked: requests that had to be sent again."""
        again, self._retried = self._retried, []
        told, self._told = self._told, []
        text = f"requests sent again: {'; '.join(again)} ({self._client.url})"
        return [*told, *([Note("sent_again", text)] if again else [])]

    def close(self) -> None:
        """Close the connections; the server stays as it is."""
        self._client.close()

    def _told_label(self) -> str | None:
        """What the server calls its weights; None of one that does not say."""
        try:
            return self._client.drive(self._weights.label)
        except (EngineError, UsageError):
            return None

    def _check_label(self) -> None:
        if self._label is None:
            return
        now = self._told_label()
        if now not in (None, self._label):
            raise EngineError(
                f"somebody else has updated the weights of the server at {self._client.url}: they are {now!r} now, and were "
                f"{self._label!r}"
            )

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
