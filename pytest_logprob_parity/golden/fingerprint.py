"""What a golden was recorded from, held against what an engine is now: the differences, and what they allow to expect."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .setup import Setup

#: How the dotted names of overridden fields of config.json begin.
_OVERRIDE: Final = "config.hf_overrides."


def differences(golden: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where two fingerprints differ: (dotted name, the golden's value, the value now), None for an absent one."""
    flat_golden, flat_now = _flat(golden), _flat(now)
    for flat in (flat_golden, flat_now):
        if isinstance(flat.get("name"), str):
            flat["name"] = re.sub(r"^(\.{1,2}/)+", "", flat["name"])  # one folder, named from where the caller stood
    if adapter_digest(flat_golden.get("adapter")) == adapter_digest(flat_now.get("adapter")):
        flat_now["adapter"] = flat_golden.get("adapter")  # the same content in a folder of another name
    golden_name, name = (str(flat.get("name", "")) for flat in (flat_golden, flat_now))
    if flat_golden.get("model") == flat_now.get("model") and Path(golden_name).name == Path(name).name:
        flat_now["name"] = flat_golden.get("name")  # one model, named from another folder
    for one, other in ((flat_golden, flat_now), (flat_now, flat_golden)):
        for key in set(one) - set(other):
            if key.startswith(_OVERRIDE) and one[key] is None:  # null is a value of config.json, and not its absence
                other[key] = "not overridden"
    names = sorted(set(flat_golden) | set(flat_now))
    return [(n, flat_golden.get(n), flat_now.get(n)) for n in names if flat_golden.get(n) != flat_now.get(n)]


def adapter_digest(recorded: Any) -> str:
    """The digest in what fingerprints have of an adapter, `FOLDER (DIGEST)`; "" where there is none."""
    return str(recorded or "").rpartition(" (")[2].removesuffix(")")


def setup_class(golden: Mapping[str, Any], apart: Sequence[tuple[str, Any, Any]]) -> Setup:
    """How a golden's fingerprint compares, once it belongs to the engine's model and prompts.

    `same`: engine, version, configuration, hardware and libraries are the golden's, bits are expected back. `compatible`:
    something of these is another. `unknown`: there is nothing to compare.

    Another adapter is `compatible` too, unlike another model: adapters are what changes from step to step, and whether the
    logprobs follow is what a check is asked. Limits and bounds are those of any other setting; its name goes with the verdict.
    """
    return "unknown" if not golden else "compatible" if apart else "same"


def keeps_schedule(now: Mapping[str, Any]) -> bool:
    """Whether an engine of this fingerprint runs the same requests in the same batches every time.

    Requests that arrive at a server several at a time meet in others, and so do those that data parallelism spreads over
    engines by their load.
    """
    config = now.get("config", {})
    return int(config.get("concurrency") or 1) == 1 and int(config.get("data_parallel_size") or 1) == 1


def moves_the_stream(name: str, golden: Any = None, now: Any = None) -> bool:
    """Whether another value of this part of a fingerprint may draw other random numbers from the same seeds.

    A server draws as the engine in it does.
    """
    if name == "engine.kind" and {golden, now} == {"vllm", "vllm-server"}:
        return False
    return not name.startswith("config.") or name in {"config.seed", "config.model_runner", "config.tensor_parallel_size"}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat
