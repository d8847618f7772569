"""Digests of what a model folder holds, and where that folder is."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..bounded import check_depth, read_text
from ..errors import UsageError
from ..json_shape import check_shape
from ..safetensors_header import header_json, read_head

#: Parts of config.json that say how a checkpoint was written, not what it computes.
_VOLATILE: Final = frozenset({"transformers_version", "_name_or_path", "torch_dtype", "dtype"})
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
#: What config.json calls the number of experts, by architecture.
_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest_of(value: Any) -> str:
    """16 hex digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def find_model(model: str, root: Path) -> Path:
    """The folder of a model: below `root`, below the current folder, or in the local hub cache. Nothing is fetched.

    Raises UsageError where there is none, or where it lacks config.json.
    """
    for folder in (root / model, Path(model)):
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise UsageError(f"model {model!r}: {folder} has no config.json, so it is no model folder")
            return folder.absolute()
    cached = None
    if model.count("/") <= 1 and not model.startswith((".", "~", "/")):
        try:
            from huggingface_hub import try_to_load_from_cache
        except ImportError:
            pass
        else:
            try:
                cached = try_to_load_from_cache(model, "config.json")
            except ValueError:
                cached = None
    if isinstance(cached, str):
        return Path(cached).parent
    raise UsageError(f"model {model!r}: no such folder (looked in {root}), and not in the local hub cache")


def find_tokenizer(folder: Path) -> Path:
    """`folder`, if it holds a tokenizer. Raises UsageError, naming the files looked for."""
    if not has_tokenizer(folder):
        raise UsageError(f"{folder} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}")
    return folder


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer; prompts as token ids need none."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


#: Bytes of a JSON file of a model folder, at most: the index of a large model has a few MB.
_MOST_JSON: Final = 64 * 2**20


@functools.lru_cache(maxsize=32)
def model_digests(model: Path, tokenizer: Path) -> Mapping[str, str]:
    """Digests of what a model folder holds: `model`, `tokenizer` (`none` where it has none), `chat_template`, `end_tokens`.

    The model's is cheap: config.json, the index and the headers of the shards (names, shapes and dtypes of all
    tensors), not the weights. In a hub cache the files are links named by their content: those names count too.
    """
    parts: dict[str, Any] = {}
    config = _table(model / "config.json")
    parts["config.json"] = {k: v for k, v in config.items() if k not in _VOLATILE}
    for file in sorted(model.glob("*.safetensors*")):
        if file.is_symlink():
            parts[file.name] = file.resolve().name
        elif file.suffix == ".json":
            parts[file.name] = _table(file)
        elif not file.is_file():
            raise UsageError(f"{file}: no regular file, so this is no model folder")
        else:
            with file.open("rb") as stream:
                parts[file.name] = hashlib.sha256(header_json(read_head(stream, 100_000_000))).hexdigest()
    experts = _experts(config)
    files = [tokenizer / n for n in (*_TOKENIZER_FILES, "merges.txt", "added_tokens.json") if (tokenizer / n).is_file()]
    return {
        "model": digest_of(parts),
        "tokenizer": digest_of({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
        if has_tokenizer(tokenizer)
        else "none",
        "chat_template": digest_of(_chat_template(tokenizer)),
        "end_tokens": canonical_json(_end_tokens(model, config)),
        **({"experts": str(experts)} if experts > 1 else {}),
    }


def _table(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises UsageError, in one line, for anything else."""
    try:
        found: dict[str, Any] = json.loads(read_text(file, _MOST_JSON))
        check_depth(found)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file}: cannot be read as JSON: {getattr(error, 'strerror', None) or error}") from None
    check_shape(found, dict, file)
    return found


def vocabulary_of(model: Path) -> int | None:
    """How many token ids a model folder's config.json has logits for; None where it does not say. Raises UsageError."""
    config = _table(model / "config.json")
    text = config.get("text_config")
    found = (text if isinstance(text, dict) else config).get("vocab_size")
    return found if isinstance(found, int) else None


def _experts(config: Mapping[str, Any]) -> int:
    """How many experts a layer of this config.json routes tokens to; 0 where none."""
    text = config.get("text_config")
    found = (c.get(name) for c in (config, text if isinstance(text, Mapping) else {}) for name in _EXPERTS)
    return max((int(n) for n in found if isinstance(n, int)), default=0)


def _end_tokens(model: Path, config: Mapping[str, Any]) -> Any:
    """The ids that end a completion; engines take them from generation_config.json, whatever else they take from it."""
    file = model / "generation_config.json"
    generation = _table(file) if file.is_file() else {}
    return generation.get("eos_token_id", config.get("eos_token_id"))


def _chat_template(tokenizer: Path) -> Any:
    file = tokenizer / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    config = tokenizer / "tokenizer_config.json"
    return _table(config).get("chat_template") if config.is_file() else None
