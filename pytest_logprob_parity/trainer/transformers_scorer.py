"""The trainer that most are made of: a transformers model, a forward pass, a gather; chunked over tokens."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

from ..checkpoint import digests
from ..checkpoint.adapter import Adapter, apply_adapter, read_adapter
from ..errors import EngineError, UsageError
from ..spec import DTYPES
from ..suggest import nearest
from .scorer import DIVISIONS

#: How many tokens have their logits over the whole vocabulary in memory at once.
CHUNK: Final = 1024
#: How many numbers fit into the cache of a CPU.
_CACHED: Final = 1 << 20


class TransformersScorer:
    """Logprobs of given tokens by a causal transformers model (see Scorer).

    - `model`: a folder (nothing is fetched) or a loaded model (a PeftModel or a wrapped model too), which is scored without
      dropout and left as it was
    - `dtype`: the precision of the model, `float64` to `bfloat16` (default: float32 for a folder, else the loaded model's)
    - `head_dtype`: the precision of its LM head (default: the model's)
    - `divides`: where the logits are divided by the temperature: `logits`, in the LM head's precision, or `float32`
    - `packed`: put the sequences of a batch one after another in one row, with positions that begin anew, as trainers without
      padding do
    - `chunk_tokens`: how many rows of logits [tokens, vocabulary] are in memory at once; logprobs do not depend on it
    - `device`: where a folder is loaded (default: a GPU if there is one)
    - `adapter`, `adapter_factor`: the folder of a LoRA adapter to merge into a model that is a folder, and a factor of it

    Raises UsageError for a folder or settings that do not exist, EngineError where the model does not load.
    """

    renormalises: Final = True
    gives_entropies: Final = True

    def __init__(
        self,
        model: Any,
        *,
        dtype: str | None = None,
        head_dtype: str | None = None,
        divides: str = "float32",
        packed: bool = False,
        chunk_tokens: int = CHUNK,
        device: str | None = None,
        adapter: str | Path | None = None,
        adapter_factor: float = 1.0,
    ) -> None:
        from ..checkpoint.float64 import compute_in_float64
        from ..checkpoint.lm_head import Head

        _check_settings(dtype, head_dtype, divides, chunk_tokens)
        self.tokenizer: Any = None
        self._mode: Literal["eval", "as found"] = "eval"
        self._settings: dict[str, Any] = {
            "dtype": dtype, "head_dtype": head_dtype, "divides": divides, "packed": packed, "chunk_tokens": chunk_tokens,
            "device": device,
        }  # fmt: skip
        self._adapter = (model, adapter) if adapter is not None else None
        #: The adapter that was merged into the model; None where there is none.
        self.adapter: Adapter | None = None
        if isinstance(model, (str, Path)):
            model, self.tokenizer, self.adapter = _load(Path(model), dtype or "float32", device, adapter, adapter_factor)
        elif adapter is not None:
            raise UsageError(
                "TransformersScorer(adapter=...): the model is loaded already; give its folder, or merge the adapter yourself"
            )
        else:
            model = _unwrapped(model)
        self.model = model
        self.dtype = str(model.dtype).removeprefix("torch.")
        if dtype not in (None, "auto", self.dtype):
            raise UsageError(
                f"TransformersScorer(dtype={dtype!r}): the model is loaded already, in {self.dtype}; give its folder"
            )
        with _as_found(model):
            if self.dtype == "float64":
                compute_in_float64(model)
            self._head = Head(model, head_dtype)
        self.head_dtype = self._head.dtype
        self.divides = divides
        self.packed = packed
        self.chunk_tokens = chunk_tokens
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        head = "" if self.head_dtype == self.dtype else f", {self.head_dtype} head"
        merged = "" if adapter is None else f", adapter {Path(adapter).name}"
        self.name = f"transformers {self.dtype}{head}{', packed' if packed else ''}{merged}"

    @property
    def has_adapters(self) -> bool:
        """Whether the model has LoRA layers, or an adapter was merged into it."""
        return self.adapter is not None or any(hasattr(module, "lora_A") for module in self.model.modules())

    def as_trained(self) -> TransformersScorer | None:
        """This scorer with every module in the mode in which it was found and new random numbers each time, as a trainer
        computes that does not switch its model to evaluation. None where no module is in training mode.
        """
        if not any(module.training for module in self.model.modules()):
            return None
        other = copy.copy(self)
        other._mode = "as found"
        other.name = f"{self.name} in training mode"
        return other

    def other_adapters(self) -> Iterator[tuple[str, Callable[[], TransformersScorer]]]:
        """Usual mistakes with the adapter, in words, each with how to load the scorer that makes it."""
        if self._adapter is None:
            return
        model, adapter = self._adapter
        for words, factor in _other_factors(Path(model), Path(adapter)):
            change: dict[str, Any] = {"adapter": None} if factor == 0 else {"adapter": adapter, "adapter_factor": factor}
            yield words, functools.partial(TransformersScorer, model, **self._settings, **change)

    def __call__(
        self,
        token_ids: Any,
        attention_mask: Any,
        temperature: float = 1.0,
        *,
        kept_token_ids: Any = None,
        kept_mask: Any = None,
        entropies: bool = False,
    ) -> Any:
        """Logprobs [B, L - 1] (nats; float64 for a float64 LM head, else float32) of the tokens from the second one on.

        `token_ids`, `attention_mask` int [B, L], padded on either side; the logprob of a padded token is 0. With
        `kept_token_ids` [B, L - 1, K] (-1: none) the distribution is one over those where `kept_mask` [B, L - 1] is set.
        With `entropies` a pair: the logprobs, and the entropies of the distributions [B, L - 1] (nats).
        """
        import torch

        with _as_found(self.model, self._mode):
            device = self.model.device
            ids, mask = token_ids.to(device), attention_mask.to(device).bool()
            hidden = self._hidden(ids, mask)
            wanted = mask[:, 1:] & mask[:, :-1]
            targets = ids[:, 1:][wanted]
            rows = hidden[:, :-1][wanted]
            kept = None
            if kept_token_ids is not None:
                kept = (kept_token_ids.to(device)[wanted], kept_mask.to(device)[wanted])
            exact = torch.float64 if self.head_dtype == "float64" else torch.float32
            columns = []
            for values in self._gather(rows, targets, temperature, kept, exact, entropies=entropies):
                columns.append(torch.zeros(wanted.shape, dtype=exact, device=device))
                columns[-1][wanted] = values
            return tuple(columns) if entropies else columns[0]

    def logits(self, token_ids: Any, attention_mask: Any) -> tuple[Any, Any]:
        """All logits [B, L - 1, V] in the LM head's precision, and the tokens [B, L - 1] that they predict: unchunked."""
        with _as_found(self.model, self._mode):
            ids, mask = token_ids.to(self.model.device), attention_mask.to(self.model.device).bool()
            return self._head.logits(self._hidden(ids, mask)[:, :-1]), ids[:, 1:]

    def _hidden(self, ids: Any, mask: Any) -> Any:
        """Last hidden states [B, L, H]; 0 where the mask is 0."""
        import torch

        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        if not self.packed:  # a masked token inside a row still counts, as in transformers without position ids
            positions = (torch.arange(ids.shape[1], device=ids.device) - mask.long().argmax(-1, keepdim=True)).clamp(min=0)
        if not self.packed:
            out = self.model.base_model(
                input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False
            )  # fmt: skip
            return out.last_hidden_state
        row = self.model.base_model(
            input_ids=ids[mask][None], position_ids=positions[mask][None], use_cache=False
        ).last_hidden_state[0]  # fmt: skip
        hidden = torch.zeros((*ids.shape, row.shape[-1]), dtype=row.dtype, device=row.device)
        hidden[mask] = row
        return hidden

    def _gather(
        self, rows: Any, targets: Any, temperature: float, kept: Any, exact: Any, *, entropies: bool
    ) -> list[Any]:  # fmt: skip
        """Logprobs [n], and with `entropies` the entropies [n]."""
        import torch

        pieces: list[list[Any]] = [[], []] if entropies else [[]]
        for start in range(0, len(rows), self.chunk_tokens):
            chunk = slice(start, start + self.chunk_tokens)
            logits = self._head.logits(rows[chunk])
            if self.divides == "logits":
                logits = (logits.div_(temperature) if temperature != 1 else logits).to(exact)
            else:
                logits = logits.to(exact)
                logits = logits.div_(temperature) if temperature != 1 else logits
            total = _logsumexp(logits)
            entropy = entropy_of(logits, total) if entropies else None
            if kept is not None:
                ids, used = kept[0][chunk], kept[1][chunk]
                chosen = logits.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
                inside = chosen.logsumexp(-1)
                total = torch.where(used, inside, total)
                entropy = None if entropy is None else torch.where(used, entropy_of(chosen, inside), entropy)
            pieces[0].append(logits.gather(-1, targets[chunk][:, None])[:, 0] - total)
            if entropy is not None:
                pieces[1].append(entropy)
        return [torch.cat(column) if column else rows.new_zeros(0, dtype=exact) for column in pieces]


def _check_settings(dtype: str | None, head_dtype: str | None, divides: str, chunk_tokens: Any) -> None:
    """Raise UsageError for settings of a TransformersScorer that do not exist."""
    for name, value, known in (
        ("dtype", dtype or "auto", DTYPES),
        ("head_dtype", head_dtype or dtype or "auto", DTYPES),
        ("divides", divides, DIVISIONS),
    ):
        if value not in known:
            hint = f"known are {', '.join(known)}{nearest(str(value), known)}"
            raise UsageError(f"TransformersScorer({name}={value!r}): {hint}")
    if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise UsageError(f"TransformersScorer(chunk_tokens={chunk_tokens!r}): must be a whole number, 1 or more")


def _unwrapped(model: Any) -> Any:
    """The causal language model inside a wrapper such as DDP's or a PeftModel, whose adapters stay in its layers."""
    while not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
        model = model.module
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "base_model"):
        raise UsageError(f"TransformersScorer({type(model).__name__}): a folder or a causal transformers model is expected")
    return inner


@contextlib.contextmanager
def _as_found(model: Any, mode: Literal["eval", "as found"] = "eval") -> Iterator[None]:
    """A context without gradients, and in the mode `eval` without dropout and autocast. It restores the modes of the model and
    all random states.
    """
    import torch

    training = [module for module in model.modules() if module.training] if mode == "eval" else []
    for module in training:
        module.training = False
    devices = [model.device] if model.device.type == "cuda" else []
    plain = torch.autocast(model.device.type, enabled=False) if mode == "eval" else contextlib.nullcontext()
    try:
        with torch.no_grad(), plain, torch.random.fork_rng(devices=devices):
            if mode == "as found":
                torch.seed()
            yield
    finally:
        for module in training:
            module.training = True


def _in_cache(logits: Any) -> Any:
    """Logits [n, V] in pieces of so few rows that they fit into the cache of a CPU."""
    return logits.split(max(1, _CACHED // logits.shape[-1])) if logits.device.type == "cpu" else (logits,)


def _logsumexp(logits: Any) -> Any:
    """log sum exp [n] over the last axis of [n, V]."""
    import torch

    return torch.cat([rows.logsumexp(-1) for rows in _in_cache(logits)])


def entropy_of(logits: Any, total: Any) -> Any:
    """Entropy [...] (nats) of the distributions of `logits` [..., V], whose log sum exp is `total` [...]: -sum p log p."""
    import torch

    if logits.dim() != 2:
        return entropy_of(logits.flatten(0, -2), total.flatten()).view(total.shape)
    pieces = []
    for rows, of_rows in zip(_in_cache(logits), total.split([len(rows) for rows in _in_cache(logits)]), strict=True):
        logprobs = rows - of_rows[:, None]
        pieces.append(-(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0)).sum(-1))
    return torch.cat(pieces)


def _other_factors(model: Path, adapter: Path) -> Iterator[tuple[str, float]]:
    """Usual wrong factors of an adapter: words, and the factor."""
    read = read_adapter(adapter, digests.find_model(str(model), Path.cwd()))
    scales, rank = sorted(set(read.modules.values())), read.rank
    yield "no adapter at all", 0.0
    if len(scales) == 1 and scales[0] != 1:
        yield "the adapter without its alpha / r", 1 / scales[0]
    yield "the adapter at half its scale", 0.5
    yield "the adapter at twice its scale", 2.0
    if rank not in (1, 4):
        yield "the adapter scaled by alpha / sqrt(r) in place of alpha / r", rank**0.5
        yield "the adapter scaled by alpha / r in place of alpha / sqrt(r)", rank**-0.5


def _load(
    folder: Path, dtype: str, device: str | None, adapter: str | Path | None, factor: float
) -> tuple[Any, Any, Adapter | None]:  # fmt: skip
    from ..checkpoint.loading import load_whole

    found = digests.find_model(str(folder), Path.cwd())
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise EngineError(f"transformers cannot be imported ({error}); install pytest-logprob-parity[trainer]") from None
    model = load_whole(found, str(folder), torch_dtype="auto" if dtype == "auto" else getattr(torch, dtype))
    read = None if adapter is None else read_adapter(Path(adapter).absolute(), found)
    if read is not None:
        apply_adapter(model, read, factor)
    from ..checkpoint.prompts import load_tokenizer

    try:
        tokenizer = load_tokenizer(digests.find_tokenizer(found))
    except UsageError:
        tokenizer = None
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer, read
