"""vLLM in this process: start it with everything pinned, read back what it took, run requests, shut it down."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import machine
from ...checkpoint.adapter import Adapter, is_adapter, read_adapter
from ...checkpoint.weight_update import WeightUpdate
from ...errors import EngineError, ParityError, UsageError
from ...reasons import mixed_builds, reason_of
from ...spec import EngineSpec, Sampling
from ...spec.engine_arguments import is_secret, vllm_engine_arguments
from ..backend import Completion, KeptSets, Request, ResolvedConfig, Routing
from ..readback import check_readback, forcing_of, json_value
from . import forced_decode, in_flight, kept_sets, lora, routing
from .completions import completion_of
from .config import SHOWN, before_its_time, settings_of, vocabulary_of, why_not_forced
from .kept_reader import numbered, take_kept
from .lm_head import applied_head, measured_grid, probe_tokens
from .own_engine import face_of
from .routing_reader import is_watched, routing_numbers, take_routings
from .sampling_parameters import sampling_parameters
from .start import IN_PROCESS, build, check_settings, environment, set_defaults, shut_down, version


class VllmBackend:
    """A vLLM engine in this process."""

    def __init__(self, llm: Any, *, asked: Mapping[str, Any], owned: bool) -> None:
        self._llm = llm
        self._owned = owned
        self._lora = lora.Lora(llm)
        self._routed = is_watched(llm.llm_engine.vllm_config)
        values = settings_of(llm.llm_engine, llm.llm_engine.vllm_config, asked, _applied_head(llm))
        name = f"vllm {version()}"
        unverified = check_readback(asked, values, name)
        forcing, unforced = forcing_of(_install_forcing(llm, values))
        self.config = ResolvedConfig(
            engine="vllm",
            version=version(),
            dtype=str(json_value(values["dtype"])),
            values={k: json_value(v) for k, v in values.items() if k in SHOWN or (k in asked and not is_secret(k))},
            unverified=unverified,
            forcing=forcing,
            unforced=unforced,
            hardware=machine.hardware(),
            vocabulary=vocabulary_of(llm.llm_engine.vllm_config),
        )

    @classmethod
    def start(cls, spec: EngineSpec, model: Path, tokenizer: Path, adapter: Adapter | None = None) -> VllmBackend:
        """Start the engine of `spec` in this process, with `adapter` on top.

        Raises UsageError for settings that the installed vLLM does not have, EngineError with the engine's own reason
        where it does not start, where a pinned value was ignored, dropped or replaced, and where it takes no adapter.
        """
        check_settings(spec)
        with environment(IN_PROCESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the engine's own house; under -W error they would end it
            set_defaults()
            try:
                import vllm
                from vllm.platforms import current_platform
            except (ImportError, OSError, RuntimeError) as error:  # the last two: a library that it loads is for another torch
                fix = mixed_builds(str(error)) or "; install pytest-logprob-parity[vllm] for GPUs or [cpu]"
                raise EngineError(f"vLLM cannot be imported ({error}){fix}") from None
            asked = spec.pins(cpu=bool(current_platform.is_cpu()))
            if adapter is not None:
                asked |= lora.arguments(adapter, asked)
            arguments: dict[str, Any] = {
                "model": str(model),
                "tokenizer": str(tokenizer),
                "worker_extension_cls": forced_decode.EXTENSION,
                "disable_log_stats": True,
                **({"use_tqdm_on_load": False} if "use_tqdm_on_load" in vllm_engine_arguments() else {}),
                **({"revision": spec.revision} if spec.revision else {}),
                **{name: value for name, value in asked.items() if name not in before_its_time(asked)},
            }
            llm = None
            try:
                llm = build(vllm.LLM, arguments, cpu=bool(current_platform.is_cpu()))
                backend = cls(llm, asked=asked, owned=True)
                if adapter is not None:
                    backend._lora.load(adapter)
                backend._check_by_measuring(asked)
                return backend
            except ParityError:
                shut_down(llm)
                raise
            except (Exception, SystemExit) as error:
                shut_down(llm)
                raise EngineError(f"vllm {version()} did not start ({spec}): {reason_of(error)}") from error

    @classmethod
    def adopt(cls, llm: Any, seconds: float = 0) -> VllmBackend:
        """Use an `LLM` or `AsyncLLM` that someone else built, as it is: nothing is pinned, and closing it is left to them.

        One that computes in another process may take `seconds` for a call; 0: no limit.
        """
        return cls(face_of(llm, seconds), asked={}, owned=False)

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """See Backend.run."""
        return self._run(requests, self._lora.request)

    def _run(self, requests: Sequence[Request], lora_request: Any) -> list[Completion]:
        numbers = self._numbers(requests)
        try:
            params = self._parameters(requests, numbers)
            _check_temperatures(requests, params)
            outputs = self._llm.generate(_prompts(requests), params, lora_request=lora_request, use_tqdm=False)
        except Exception as error:
            if not _is_refusal(error):
                raise
            engine = self._llm.llm_engine
            while engine.has_unfinished_requests():  # those that it took before the one that it refused
                engine.step()
            self._take(numbers)
            raise UsageError(f"vllm {version()} refuses a request: {reason_of(error)}") from error
        return self._completions(requests, numbers, outputs)

    def _numbers(self, requests: Sequence[Request]) -> list[tuple[int | None, int | None]]:
        """The numbers under which the worker keeps the kept tokens of each request, and its experts."""
        routed = routing_numbers(requests, self.config, watched=self._routed)
        return list(zip(numbered(requests, self.config), routed, strict=True))

    def _parameters(self, requests: Sequence[Request], numbers: Sequence[tuple[int | None, int | None]]) -> list[Any]:
        """The SamplingParams of requests; what is seen of them beside the logprobs the worker keeps under their `numbers`."""
        from vllm import SamplingParams

        return [
            SamplingParams(**sampling_parameters(request, self.config.forcing, *of_request), **_flat())
            for request, of_request in zip(requests, numbers, strict=True)
        ]

    def _completions(
        self, requests: Sequence[Request], numbers: Sequence[tuple[int | None, int | None]], outputs: Sequence[Any]
    ) -> list[Completion]:
        kept, routings = self._take(numbers)
        return [
            completion_of(request, output, kept.get(number), routings.get(routed))
            for request, (number, routed), output in zip(requests, numbers, outputs, strict=True)
        ]

    def _take(self, numbers: Sequence[tuple[int | None, int | None]]) -> tuple[dict[Any, KeptSets], dict[Any, Routing]]:
        """What the worker kept under these numbers."""
        kept, routed = ([pair[place] for pair in numbers] for place in (0, 1))
        return (
            take_kept(kept, lambda asked: self._ask("logprob_parity_kept", kept_sets.take, asked)),
            take_routings(routed, lambda asked: self._ask("logprob_parity_routing", routing.take_routing, asked)),
        )

    def _ask(self, name: str, function: Callable[..., Any], numbers: list[int]) -> Mapping[str, Any]:
        """What the worker kept under these numbers; {} where nobody can ask it."""
        extended = getattr(self._llm.llm_engine.vllm_config.parallel_config, "worker_extension_cls", "")
        if extended:
            with contextlib.suppress(AttributeError, NotImplementedError):  # the extension is another class
                return self._llm.collective_rpc(name, args=(numbers,))[0]  # type: ignore[no-any-return]
        with contextlib.suppress(AttributeError, NotImplementedError, TypeError):  # it lives in another process
            return self._llm.collective_rpc(function, args=(numbers,))[0]  # type: ignore[no-any-return]
        return {}

    def run_through(self, requests: Sequence[Request], update: WeightUpdate) -> tuple[list[Completion], list[int]]:
        """Answer all requests with a weight update on the way; also how many tokens each had written by then.

        Raises EngineError where this engine cannot do that.
        """
        self._check_steps_alone()
        numbers = self._numbers(requests)
        params = self._parameters(requests, numbers)
        outputs, before = in_flight.run_through(
            self._llm, _prompts(requests), params, update, self._load, self._lora.request
        )  # fmt: skip
        return self._completions(requests, numbers, outputs), before

    def update_weights(self, update: WeightUpdate) -> None:
        """Take new weights while no request runs."""
        in_flight.apply_update(self._llm, update, self._load)
        self._check_adapter()

    def sleep(self, level: int) -> None:
        """See Engine.sleep."""
        self._check_can_sleep()
        self._llm.sleep(level=level)

    def wake_up(self, tags: list[str] | None) -> None:
        """See Engine.wake_up."""
        self._check_can_sleep()
        self._llm.wake_up(tags=tags)

    def _check_can_sleep(self) -> None:
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            raise UsageError("the CPU build of vLLM refuses sleep: it needs a GPU")
        if not getattr(self._llm.llm_engine.vllm_config.model_config, "enable_sleep_mode", False):
            raise UsageError("this engine cannot sleep: start it with enable_sleep_mode=True")

    def _load(self, weights: Path | Mapping[str, Any]) -> None:
        """Put new weights in, or another adapter on top; one that is there stays on top of new weights."""
        if isinstance(weights, Path) and is_adapter(weights):
            self._lora.load(read_adapter(weights))
        else:
            in_flight.load(self._llm, weights)
            self._lora.restore()

    def _check_by_measuring(self, asked: Mapping[str, Any]) -> None:
        """What a started engine says of itself and does not do. Raises EngineError."""
        self._check_adapter()
        wish = (asked.get("hf_overrides") or {}).get("head_dtype") if isinstance(asked.get("hf_overrides"), dict) else None
        if str(wish).removeprefix("torch.") in ("float32", "float", "fp32") and self.config.dtype in ("bfloat16", "float16"):
            grid = measured_grid(self._probe(self._lora.request).top_logprobs)
            if grid:
                raise EngineError(
                    f"vllm {version()} did not take hf_overrides: asked for a head in float32 and says that it has one, but "
                    f"its logits lie on a grid of 1/{1 / grid:g}, as those of a head in {self.config.dtype}"
                )

    def _check_adapter(self) -> None:
        self._lora.check_moves(lambda request: self._probe(request).top_logprobs)

    def _probe(self, lora_request: Any) -> Completion:
        """The two likeliest raw logprobs at some positions, by a prefill."""
        model = self._llm.llm_engine.vllm_config.model_config
        first, *rest = probe_tokens(model.get_vocab_size(), self.config.max_model_len)
        return self._run(
            [Request(prompt_token_ids=[first], sampling=Sampling(logprobs=2), scored_token_ids=rest)], lora_request
        )[0]

    def _check_steps_alone(self) -> None:
        if self.config.values.get("async_scheduling"):
            raise EngineError("with async_scheduling a step is under way between any two: no token to update the weights at")

    def weight_checksums(self) -> dict[str, str]:
        """vLLM's own checksum of each parameter; none where it has no such function (before 0.32)."""
        try:
            of_workers: list[dict[str, str]] = self._llm.collective_rpc("compute_weight_checksums")
        except (AttributeError, NotImplementedError):
            return {}
        return {name: digest for sums in of_workers for name, digest in sums.items()}

    def on_worker(self, work: Callable[[Any], Any]) -> list[Any]:
        """Run `work(worker)` on the workers, in this process."""
        results: list[Any] = self._llm.collective_rpc(work)
        return results

    def is_whole(self) -> bool:
        """Whether vLLM's parallel groups are still there: the end of another LLM in this process takes them away."""
        from vllm.distributed import parallel_state

        return bool(parallel_state.model_parallel_is_initialized())

    def close(self) -> None:
        """See Backend.close."""
        llm, self._llm = self._llm, None
        if self._owned:
            shut_down(llm)


def _prompts(requests: Sequence[Request]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": [*r.prompt_token_ids, *(r.scored_token_ids or ())]} for r in requests]


def _check_temperatures(requests: Sequence[Request], params: Sequence[Any]) -> None:
    """Raise EngineError where vLLM took another temperature than the traces of its answers will be labelled with."""
    for request, taken in zip(requests, params, strict=True):
        label = request.sampling.as_run_by("vllm").temperature
        if request.scored_token_ids is None and abs(taken.temperature - label) > 1e-9:
            asked = f"temperature={request.sampling.temperature:g} was asked for"
            raise EngineError(f"vllm {version()} samples with temperature={taken.temperature:g}, {asked}")


def _is_refusal(error: Exception) -> bool:
    """Whether an error is about what was asked; the engine is as well as before."""
    client_error = any(base.__name__ == "VLLMClientError" for base in type(error).__mro__)
    return client_error or isinstance(error, (ValueError, TypeError, OverflowError))


def _install_forcing(llm: Any, values: Mapping[str, Any]) -> str:
    """How the engine forces tokens from now on, or why it cannot; see `forcing_of`."""
    config = llm.llm_engine.vllm_config
    if known := why_not_forced(config, values):
        return known
    if getattr(config.parallel_config, "worker_extension_cls", ""):
        with contextlib.suppress(AttributeError, NotImplementedError):
            return str(llm.collective_rpc("logprob_parity_install")[0])
    try:
        return str(llm.collective_rpc(forced_decode.install)[0])
    except TypeError:
        name = forced_decode.EXTENSION
        return f"the engine lives in another process: build it with worker_extension_cls={name!r}"


def _applied_head(llm: Any) -> str | None:
    """The precision of the head as the worker has it; None where nobody can look or this version has no such setting."""
    extended = getattr(llm.llm_engine.vllm_config.parallel_config, "worker_extension_cls", "")
    with contextlib.suppress(AttributeError, NotImplementedError, TypeError):
        head = llm.collective_rpc("logprob_parity_head" if extended else applied_head)[0]
        return None if head is None else str(head)
    return None


def _flat() -> dict[str, bool]:
    """Flat logprobs where this vLLM has them: a dict for each token costs more than the sampling."""
    from vllm import SamplingParams

    return {"flat_logprobs": True} if "flat_logprobs" in getattr(SamplingParams, "__struct_fields__", ()) else {}
