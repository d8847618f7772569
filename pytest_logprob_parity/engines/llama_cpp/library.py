"""llama.cpp's own C interface, through the bindings of `llama-cpp-py-sync`: a model, and contexts that decode batches.

The library in that package is built for glibc 2.38. On an earlier Linux the one in the package `xllamacpp` stands in its place,
which exports the same interface, where it is of the same build or a neighbour's: structures of C have no version of their own.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import EngineError
from ...machine import installed_version

#: Types of keys and values by name: ggml's numbers.
CACHE_TYPES: Final = {"float32": 0, "float16": 1, "bfloat16": 30, "q8_0": 8}
#: A context's length is a multiple of this.
_PADDING: Final = 256
#: llama.cpp's levels of log lines: those from here on are warnings and errors.
_WARNING: Final = 3
_FAILED: Final = {1: "no room in its cache", 2: "aborted", -1: "the batch is not valid"}


class Word(NamedTuple):
    """One token of a batch: where in which sequence it stands, and whether its logits are wanted."""

    token: int
    position: int
    sequence: int
    wanted: bool


class Library:
    """The library, loaded once in a process, quiet: its last warnings are kept for messages."""

    _loaded: Library | None = None

    def __init__(self) -> None:
        try:
            from llama_cpp_py_sync import __llama_cpp_tag__
            from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
        except ImportError as error:
            raise EngineError(
                f"llama.cpp (the package llama-cpp-py-sync) cannot be imported ({error}); install "
                "pytest-logprob-parity[llama-cpp]"
            ) from None
        self.ffi = get_ffi()
        self.build = str(__llama_cpp_tag__)
        try:
            self.lib = get_lib()
        except (OSError, RuntimeError) as error:
            path, self.build = _another_build(self.build, str(error))
            self.lib = self.ffi.dlopen(str(path))
        self._words: deque[str] = deque(maxlen=8)
        self._callback = self.ffi.callback("void(enum ggml_log_level, const char *, void *)", self._log)
        self.lib.llama_log_set(self._callback, self.ffi.NULL)
        self.lib.llama_backend_init()

    @classmethod
    def load(cls) -> Library:
        """The library of this process. Raises EngineError naming what to install."""
        if cls._loaded is None:
            cls._loaded = cls()
        return cls._loaded

    def last_words(self) -> str:
        """What it last warned of, in one line."""
        words = " ".join("".join(self._words).split())
        self._words.clear()
        return words or "it left no message"

    def _log(self, level: int, text: Any, _: Any) -> None:
        if level >= _WARNING:
            self._words.append(self.ffi.string(text).decode("utf-8", "replace"))


def _another_build(build: str, why: str) -> tuple[Path, str]:
    """The library of `xllamacpp` and its build, for bindings of `build` whose own library did not load because of `why`.

    Raises EngineError where it is not there, or of a build that is further away than a neighbour.
    """
    glibc = re.search(r"GLIBC_[0-9.]+", why)
    reason = f"it needs {glibc[0]}" if glibc else " ".join(why.split())[:200]
    fix = f"install xllamacpp of the same build ({build[1:]}) beside it, or use a newer Linux"
    found = importlib.util.find_spec("xllamacpp")
    version = installed_version("xllamacpp") or ""
    folders = found.submodule_search_locations or [] if found else []
    paths = [path for folder in folders for path in Path(folder).glob("xllamacpp*.so")]
    if not paths:
        raise EngineError(f"the library of llama-cpp-py-sync does not load here ({reason}): {fix}")
    number = version.rpartition(".")[2]
    if not number.isdecimal() or abs(int(number) - int(build[1:])) > 1:
        raise EngineError(
            f"the library of llama-cpp-py-sync does not load here ({reason}), and xllamacpp {version} is another build: {fix}"
        )
    return paths[0], f"b{number}"


class Model:
    """A GGUF file in memory. Raises EngineError where llama.cpp does not load it."""

    def __init__(self, library: Library, path: Path, gpu_layers: int) -> None:
        self.library = library
        parameters = library.lib.llama_model_default_params()
        parameters.n_gpu_layers = gpu_layers
        self.handle = library.lib.llama_model_load_from_file(os.fsencode(path), parameters)
        if self.handle == library.ffi.NULL:
            raise EngineError(f"llama.cpp {library.build} did not load {path}: {library.last_words()}")
        self.vocabulary = int(library.lib.llama_vocab_n_tokens(library.lib.llama_model_get_vocab(self.handle)))

    def close(self) -> None:
        """Give the memory back. Safe to call twice."""
        handle, self.handle = self.handle, None
        if handle is not None:
            self.library.lib.llama_model_free(handle)


class Context:
    """Keys and values of `sequences` sequences of `length` tokens each at most, in float32 unless `cache` says otherwise."""

    def __init__(self, model: Model, sequences: int, length: int, *, cache: str, threads: int, batch: int) -> None:
        self._lib, self._ffi, self._model = model.library.lib, model.library.ffi, model
        padded = -(-length // _PADDING) * _PADDING
        parameters = self._lib.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = padded * sequences, sequences
        parameters.n_batch = parameters.n_ubatch = batch
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = CACHE_TYPES[cache]
        parameters.flash_attn_type = 0 if cache != "q8_0" else 1  # off: softmax(QK)V step by step, all of it in float32
        parameters.kv_unified = False
        parameters.no_perf = True
        self._batch_size = batch
        self._handle = self._lib.llama_init_from_model(model.handle, parameters)
        if self._handle == self._ffi.NULL:
            library = model.library
            raise EngineError(
                f"llama.cpp {library.build} made no context of {sequences} x {padded} tokens: {library.last_words()}"
            )
        self._batch = self._lib.llama_batch_init(batch, 0, 1)

    def decode(self, words: Sequence[Word]) -> npt.NDArray[np.float32]:
        """Logits [number of wanted words, V]. Raises EngineError."""
        rows = [self._decode(words[i : i + self._batch_size]) for i in range(0, len(words), self._batch_size)]
        return np.concatenate(rows)

    def _decode(self, words: Sequence[Word]) -> npt.NDArray[np.float32]:
        batch = self._batch
        for i, word in enumerate(words):
            batch.token[i], batch.pos[i], batch.logits[i] = word.token, word.position, word.wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, word.sequence
        batch.n_tokens = len(words)
        status = int(self._lib.llama_decode(self._handle, batch))
        if status:
            library = self._model.library
            why = _FAILED.get(status, f"status {status}")
            raise EngineError(f"llama.cpp {library.build} decoded nothing: {why}: {library.last_words()}")
        size = self._model.vocabulary * 4
        rows = [self._row(i, size) for i, word in enumerate(words) if word.wanted]
        return np.stack(rows) if rows else np.empty((0, self._model.vocabulary), np.float32)

    def _row(self, place: int, size: int) -> npt.NDArray[np.float32]:
        pointer = self._lib.llama_get_logits_ith(self._handle, place)
        row: npt.NDArray[np.float32] = np.frombuffer(self._ffi.buffer(pointer, size), np.float32).copy()
        return row

    def close(self) -> None:
        """Give the memory back. Safe to call twice."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(handle)
