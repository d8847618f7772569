"""llama.cpp as an engine: forced along tokens one step at a time, all logits read back, float32 from weights to softmax."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ... import machine
from ...checkpoint.adapter import Adapter
from ...errors import EngineError, UsageError
from ...spec import DTYPES, EngineSpec
from ...suggest import nearest
from ..backend import Completion, Request, ResolvedConfig
from ..numpy_sampler import Sequenced, completion_of, log_softmax, row_of
from ..readback import check_readback
from .gguf_file import QUANTIZED, TYPES, GgufFile, own_file, written_for
from .layout import layout_of
from .library import CACHE_TYPES, Context, Library, Model, Word

#: Engine arguments that this engine knows besides the fields of EngineSpec.
SETTINGS: Final = (
    "logprobs_mode", "max_model_len", "max_num_seqs", "kv_cache_dtype", "quantization", "gguf", "threads", "n_gpu_layers",
)  # fmt: skip
#: Pins of a profile that hold here by construction: there is no cache across requests, no scheduler, no compiler.
_BY_NATURE: Final = {
    "enable_prefix_caching": False,
    "async_scheduling": False,
    "enable_chunked_prefill": False,
    "enforce_eager": True,
    "generation_config": "vllm",
}
#: How many tokens of a prompt are decoded at a time, and how many have their logits in memory.
_BATCH: Final = 256


class LlamaCppBackend:
    """A GGUF model of llama.cpp in this process."""

    def __init__(self, spec: EngineSpec, library: Library, file: GgufFile, context: int, folder: Path, tokenizer: Path) -> None:
        asked = spec.pins(cpu=True)
        dtype = file.dtype or (spec.dtype if spec.dtype != "auto" else "float32")
        values: dict[str, Any] = _BY_NATURE | {
            "seed": spec.seed,
            "dtype": dtype,
            "logprobs_mode": asked.get("logprobs_mode", "raw_logprobs"),
            "max_model_len": asked.get("max_model_len", context),
            "max_num_seqs": asked.get("max_num_seqs", 16),
            "kv_cache_dtype": asked.get("kv_cache_dtype", "auto"),
            "quantization": file.quantization or None,
            "threads": asked["threads"] if "threads" in asked else machine.default_threads(),
            "n_gpu_layers": asked.get("n_gpu_layers", 0),
            **({"gguf": spec.settings["gguf"]} if "gguf" in spec.settings else {}),
        }
        for name in ("max_model_len", "max_num_seqs", "threads"):
            if not isinstance(values[name], int) or values[name] < 1:
                raise UsageError(f"engine='llama_cpp': {name}={values[name]!r}: must be a whole number, 1 or more")
        self._cache = str(values["kv_cache_dtype"])
        self._cache = dtype if self._cache == "auto" else self._cache
        if self._cache not in CACHE_TYPES:
            known = ", ".join(("auto", *CACHE_TYPES))
            raise UsageError(f"engine='llama_cpp': kv_cache_dtype={self._cache!r}: known are {known}")
        self._sequences, self._threads = int(values["max_num_seqs"]), int(values["threads"])
        self._end_ids = end_ids(folder, tokenizer)
        self._tokenizer = tokenizer
        self._model: Model | None = None
        unverified = check_readback(asked, values, f"llama.cpp {library.build}")
        self._model = Model(library, file.path, int(values["n_gpu_layers"]))
        self.config = ResolvedConfig(
            engine="llama_cpp",
            version=library.build,
            dtype=dtype,
            values=values,
            unverified=unverified,
            hardware=machine.cpu(self._threads),
            libraries=machine.libraries("numpy"),
            vocabulary=self._model.vocabulary,
        )

    @classmethod
    def start(cls, spec: EngineSpec, model: Path, tokenizer: Path, adapter: Adapter | None = None) -> LlamaCppBackend:
        """Convert the model where the cache does not have it, and load it.

        Raises UsageError for what this engine does not have, EngineError where a package is missing or loading fails,
        IncomparableError for a GGUF file of another model.
        """
        for name in spec.settings:
            if name not in SETTINGS:
                raise UsageError(f"engine='llama_cpp' has no setting {name!r}{nearest(name, SETTINGS)}")
        if adapter is not None:
            raise UsageError("engine='llama_cpp' takes no adapter: merge it into the checkpoint first")
        library = Library.load()
        layout = layout_of(model)
        if (named := spec.settings.get("gguf")) is not None:
            file = own_file(str(named), model, layout)
        else:
            file = written_for(model, layout, *_written_as(spec, layout.dtype))
        return cls(spec, library, file, layout.context, model, tokenizer)

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """See Backend.run."""
        completions: list[Completion] = []
        for start in range(0, len(requests), self._sequences):
            batch = requests[start : start + self._sequences]
            scored = [r for r in batch if r.scored_token_ids is not None]
            if 0 < len(scored) < len(batch):
                raise EngineError("llama.cpp: scoring and decoding requests cannot be mixed in one call")
            completions += [self._score(request) for request in scored] or self._decode(batch)
        return completions

    def close(self) -> None:
        """See Backend.close."""
        model, self._model = self._model, None
        if model is not None:
            model.close()

    def _score(self, request: Request) -> Completion:
        tokens = [int(t) for t in request.scored_token_ids or ()]
        prompt = request.prompt_token_ids
        ids = [*prompt, *tokens][:-1]
        words = [Word(token, i, 0, i >= len(prompt) - 1) for i, token in enumerate(ids)]
        rows: list[Any] = []
        with self._context(1, len(ids)) as context:
            for start in range(0, len(words), _BATCH):
                for logits in context.decode(words[start : start + _BATCH]):
                    logprobs = log_softmax(logits.astype(np.float64))
                    rows.append(row_of(logprobs, tokens[len(rows)], request.sampling.logprobs))
        return completion_of(tokens, rows, "unknown")

    def _decode(self, requests: Sequence[Request]) -> list[Completion]:
        """All requests side by side, one token a step for each that has not ended."""
        processed = self.config.logprobs_mode == "processed_logprobs"
        longest = self.config.max_model_len or 1
        all_ = [Sequenced(request=r, processed=processed, end_ids=self._end_ids, longest=longest) for r in requests]
        length = max(min(len(s.request.prompt_token_ids) + _most(s.request), longest) for s in all_)
        reasons = ["" for _ in all_]
        with self._context(len(all_), length) as context:
            alive = {}
            for i, s in enumerate(all_):
                prompt = s.request.prompt_token_ids
                words = [Word(token, place, i, place == len(prompt) - 1) for place, token in enumerate(prompt)]
                alive[i] = context.decode(words)[0]
            while alive:
                words = []
                for i, logits in alive.items():
                    token = all_[i].take(logits)
                    reasons[i] = all_[i].finish_reason(self._text(all_[i]))
                    if not reasons[i]:
                        place = len(all_[i].request.prompt_token_ids) + len(all_[i].written) - 1
                        words.append(Word(token, place, i, True))
                rows = context.decode(words) if words else ()
                alive = {word.sequence: row for word, row in zip(words, rows, strict=True)}
        return [completion_of(s.written, s.rows, reason) for s, reason in zip(all_, reasons, strict=True)]

    def _text(self, sequenced: Sequenced) -> str | None:
        """What was written, in words, where stop strings are looked for."""
        if not sequenced.request.sampling.stop or sequenced.request.forced_token_ids is not None:
            return None
        from ...checkpoint.prompts import load_tokenizer

        return str(load_tokenizer(self._tokenizer).decode(sequenced.written, skip_special_tokens=True))

    @contextlib.contextmanager
    def _context(self, sequences: int, length: int) -> Iterator[Context]:
        if self._model is None:
            raise EngineError("llama.cpp: this engine was shut down")
        context = Context(self._model, sequences, length, cache=self._cache, threads=self._threads, batch=_BATCH)
        try:
            yield context
        finally:
            context.close()


def _most(request: Request) -> int:
    return request.sampling.max_tokens if request.forced_token_ids is None else len(request.forced_token_ids)


def _written_as(spec: EngineSpec, own: str) -> tuple[str, str]:
    """The dtype and quantization to write a checkpoint in; `own` is what its config.json says. Raises UsageError."""
    dtype = own if spec.dtype == "auto" else spec.dtype
    if dtype not in TYPES:
        known = [name for name in DTYPES if name in TYPES]
        raise UsageError(f"engine='llama_cpp' computes in {', '.join(known)}, not in {dtype}")
    quantization = str(spec.settings.get("quantization") or "").lower()
    if quantization and quantization not in QUANTIZED:
        raise UsageError(
            f"engine='llama_cpp' quantizes to {', '.join(QUANTIZED)}, not to {quantization!r}; name a file of llama.cpp's own "
            "tools for others: gguf='FILE'"
        )
    return dtype, quantization


def end_ids(model: Path, tokenizer: Path) -> frozenset[int]:
    """What ends a completion: the end tokens of tokenizer, configuration and generation configuration, as vLLM takes them."""
    ids: set[Any] = set()
    for name in ("config.json", "generation_config.json"):
        told = _json(model / name).get("eos_token_id")
        ids |= set(told) if isinstance(told, list) else {told}
    text = _json(tokenizer / "tokenizer_config.json").get("eos_token")
    text = text.get("content") if isinstance(text, dict) else text
    for added in _json(tokenizer / "tokenizer.json").get("added_tokens") or ():
        ids |= {added.get("id")} if text is not None and added.get("content") == text else set()
    return frozenset(i for i in ids if isinstance(i, int))


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
