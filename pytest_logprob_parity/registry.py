"""Looking things up by name: those of this package, and those that other installed distributions add by entry points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Generic, TypeVar

from .errors import UsageError

_T = TypeVar("_T")

_ENGINES: Final = f"{__package__}.engines"
_FRAMEWORKS: Final = f"{__package__}.trainer.frameworks"
#: What this package registers: group -> name -> "module:attribute", as entry points say it. They are listed here and not in the
#: package's metadata because a copy of the package on PYTHONPATH, which is how `matrix` runs it elsewhere, has no metadata.
OWN_ENTRIES: Final[Mapping[str, Mapping[str, str]]] = {
    "logprob_parity.engines": {
        "vllm": f"{_ENGINES}.vllm.kind:VLLM",
        "transformers": f"{_ENGINES}.transformers.kind:TRANSFORMERS",
        "llama_cpp": f"{_ENGINES}.llama_cpp.kind:LLAMA_CPP",
        "sglang": f"{_ENGINES}.sglang.kind:SGLANG",
    },
    "logprob_parity.frameworks": {
        "trl": f"{_FRAMEWORKS}.trl:TRL",
        "verl": f"{_FRAMEWORKS}.verl:VERL",
        "openrlhf": f"{_FRAMEWORKS}.openrlhf:OPENRLHF",
        "nemo-aligner": f"{_FRAMEWORKS}.nemo_aligner:NEMO_ALIGNER",
        "nemo-rl": f"{_FRAMEWORKS}.nemo_rl:NEMO_RL",
        "pipelinerl": f"{_FRAMEWORKS}.pipelinerl:PIPELINERL",
        "deepspeed-chat": f"{_FRAMEWORKS}.deepspeed_chat:DEEPSPEED_CHAT",
    },
    "logprob_parity.profiles": {
        "trl": f"{_FRAMEWORKS}.profiles:TRL",
        "verl": f"{_FRAMEWORKS}.profiles:VERL",
        "openrlhf": f"{_FRAMEWORKS}.profiles:OPENRLHF",
        "nemo-rl": f"{_FRAMEWORKS}.profiles:NEMO_RL",
        "pipelinerl": f"{_FRAMEWORKS}.profiles:PIPELINERL",
        "pipelinerl-v1-first": f"{_FRAMEWORKS}.profiles:PIPELINERL_V1_FIRST",
    },
}


class Registry(Mapping[str, _T], Generic[_T]):
    """Things of one kind by name, imported when they are asked for: `registry["verl"]`.

    The names are those of `at_hand`, of OWN_ENTRIES, and of the entry points of `group` in installed distributions, in this
    order; the first one of a name counts. Listing the names, and `in`, import nothing. `kind` is what messages call a thing,
    `fits` says whether an imported object is one.

    `registry[name]` raises KeyError for a name that nobody registers, and UsageError for an entry that does not import, that
    holds something else, or that two distributions register.
    """

    def __init__(self, kind: str, group: str, *, fits: Callable[[Any], bool], at_hand: Mapping[str, _T] | None = None) -> None:
        self.kind, self.group = kind, group
        self._fits, self._at_hand = fits, at_hand or {}
        self._own = {name: EntryPoint(name, value, group) for name, value in OWN_ENTRIES.get(group, {}).items()}

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._at_hand, *self._own, *(entry.name for entry in entry_points(group=self.group)))))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._at_hand or name in self._own or any(name == e.name for e in entry_points(group=self.group))

    def __getitem__(self, name: str) -> _T:
        if name in self._at_hand:
            return self._at_hand[name]
        entry = self._own[name] if name in self._own else self._installed(name)
        where = f"the {self.kind} {name!r}, which is registered as {entry.value}"
        try:
            thing = entry.load()
        except Exception as error:
            raise UsageError(f"{where}, cannot be imported: {type(error).__name__}: {error}") from error
        if not self._fits(thing):
            raise UsageError(f"{where}, is a {type(thing).__name__}: expected a {self.kind}")
        found: _T = thing
        return found

    def _installed(self, name: str) -> EntryPoint:
        """The entry point of that name. Raises KeyError, or UsageError where there are several."""
        found = {entry.value: entry for entry in entry_points(group=self.group) if entry.name == name}
        if not found:
            raise KeyError(name)
        if len(found) > 1:
            raise UsageError(
                f"the {self.kind} {name!r} is registered more than once, as {' and '.join(sorted(found))}: uninstall all but "
                "one of the distributions that register it"
            )
        return next(iter(found.values()))
