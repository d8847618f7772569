"""What a scorer is: a function that computes a trainer's logprobs; and what more a scorer may be able to do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, runtime_checkable

from ..errors import UsageError
from ..spec import DTYPES
from ..suggest import nearest

if TYPE_CHECKING:
    from ..checkpoint.adapter import Adapter

_F = TypeVar("_F", bound=Callable[..., Any])

#: Where a scorer divides by the temperature: the logits as the LM head gave them, or after they were made float32.
DIVISIONS: Final = ("logits", "float32")


class Scorer(Protocol):
    """`(token_ids [B, L], attention_mask [B, L], temperature) -> logprobs` of the given tokens, in nats.

    Token ids and mask are int64 torch tensors, padded on the right (mask 0). What comes back is [B, L - 1], of the tokens
    from the second one on, or [B, L], whose first column is not used; a torch tensor or an array. A plain function is a
    scorer too. `scorer(...)` declares its precision; without that its limits are those of bfloat16.

    A scorer may have these attributes:

    - `dtype`, `head_dtype`: precision of the model and of its LM head
    - `divides`: where it divides by the temperature, one of DIVISIONS
    - `name`: what reports call it
    - `renormalises`: it also takes `kept_token_ids` [B, L - 1, K] (-1: none) and `kept_mask` [B, L - 1], and makes its
      distribution one over the kept tokens where the mask is set
    - `gives_entropies`: with `entropies=True` it returns two of them, the logprobs and the entropies [B, L - 1] (nats) of the
      distributions that they are of
    - `vocabulary`: how many token ids it knows; `tokenizer`: a transformers tokenizer, to compare with the rollouts' texts
    - `model`: a torch module; scoring must leave its modes and its weights as they were
    """

    def __call__(self, token_ids: Any, attention_mask: Any, temperature: float, /) -> Any:
        """Logprobs of the given tokens."""
        ...


@runtime_checkable
class GivesLogits(Protocol):
    """A scorer that also gives its logits over the whole vocabulary."""

    def logits(self, token_ids: Any, attention_mask: Any, /) -> tuple[Any, Any]:
        """Logits [B, L - 1, V] and the tokens [B, L - 1] that they predict."""
        ...


@runtime_checkable
class HasTrainingMode(Protocol):
    """A scorer whose model can also be run in training mode, where dropout is on."""

    def as_trained(self) -> Scorer | None:
        """The scorer of the model in training mode; None where the model is not in training mode."""
        ...


@runtime_checkable
class TakesAdapters(Protocol):
    """A scorer whose model can have a LoRA adapter."""

    adapter: Adapter | None

    @property
    def has_adapters(self) -> bool:
        """Whether its model has LoRA layers, or an adapter was merged into it."""
        ...

    def other_adapters(self) -> Iterator[tuple[str, Callable[[], Scorer]]]:
        """Usual mistakes with this adapter, in words, each with how to load the scorer that makes it."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Declared:
    """The attributes of a scorer (see Scorer), with a default for each that it does not have."""

    name: str
    dtype: str = "unknown"
    head_dtype: str = ""
    renormalises: bool = False
    gives_entropies: bool = False
    vocabulary: int | None = None
    tokenizer: Any = None
    model: Any = None

    @classmethod
    def by(cls, scorer: Any) -> Declared:
        """What this scorer declares. Any callable can be a scorer: only here are its attributes looked up by name."""
        names = ("dtype", "head_dtype", "renormalises", "gives_entropies", "vocabulary", "tokenizer", "model")
        return cls(name=name_of(scorer), **{name: getattr(scorer, name) for name in names if hasattr(scorer, name)})


def name_of(scorer: Any) -> str:
    """What reports call a scorer."""
    return str(getattr(scorer, "name", "") or getattr(scorer, "__name__", type(scorer).__name__))


def scorer(*, dtype: str, head_dtype: str = "", divides: str = "float32", name: str = "") -> Callable[[_F], _F]:
    """Declare what a scoring function is: `@scorer(dtype="bfloat16", head_dtype="float32", divides="logits")`.

    Raises UsageError for an unknown dtype and for a `divides` that is not one of DIVISIONS.
    """
    for field, value, known in (
        ("dtype", dtype, DTYPES), ("head_dtype", head_dtype or dtype, DTYPES), ("divides", divides, DIVISIONS),
    ):  # fmt: skip
        if value not in known:
            raise UsageError(f"scorer({field}={value!r}): known are {', '.join(known)}{nearest(str(value), known)}")

    def declare(function: _F) -> _F:
        @functools.wraps(function)
        def declared(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        vars(declared).update(dtype=dtype, head_dtype=head_dtype or dtype, divides=divides, name=name or function.__name__)
        return declared  # type: ignore[return-value]

    return declare
