"""From prompts as users give them (strings, token ids, message lists) to token ids, turn by turn."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import EngineError, UsageError
from .digests import has_tokenizer

#: Stands for a turn that the engine is still to write, while the text around it is rendered.
_HOLE: Final = "\u2042logprob-parity-turn\u2042"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids up to the first turn, and what the environment says between a turn and the next one.

    `between[i]` is the rendered text from the end of turn i's content to the start of turn i + 1's, as token ids; it
    begins with whatever ends a turn in the chat template.
    """

    token_ids: tuple[int, ...]
    between: tuple[tuple[int, ...], ...] = ()


@functools.lru_cache(maxsize=8)
def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer of a local folder. Raises UsageError with the reason where it cannot be loaded."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise EngineError(
            "transformers, which comes with vLLM and tokenizes the prompts, is not installed; install"
            " pytest-logprob-parity[vllm] for GPUs or [cpu]"
        ) from None
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"the tokenizer in {folder} does not load: {str(error).splitlines()[0]}") from None


def tokenizer_of(folder: Path) -> Any:
    """The transformers tokenizer of a local folder; None where it holds none. Raises UsageError where it does not load."""
    return load_tokenizer(folder) if has_tokenizer(folder) else None


def banned_ids(tokenizer: Any, words: Sequence[str]) -> list[list[int]]:
    """The token ids of bad words, with and without a space before them, as vLLM takes them (SamplingParams).

    Raises UsageError for words where there is no tokenizer, and for one that makes no tokens.
    """
    if words and tokenizer is None:
        raise UsageError(f"Sampling(bad_words={list(words)!r:.80}): the model's folder has no tokenizer to read texts with")
    banned: list[list[int]] = []
    for word in words:
        bare, spaced = (list(tokenizer.encode(before + word.lstrip(), add_special_tokens=False)) for before in ("", " "))
        if not bare:
            raise UsageError(f"Sampling(bad_words): {word!r} makes no tokens")
        banned.append(bare)
        if spaced and spaced[0] != bare[0] and len(spaced) == len(bare):
            banned.append(spaced)
    return banned


def check_prompts(prompts: Any) -> list[Any]:
    """The prompts as a list of JSON values; raises UsageError for an empty one or one of no known form."""
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence):
        raise UsageError(f"prompts must be a list (of strings, token-id lists or message lists), not {type(prompts).__name__}")
    if not prompts:
        raise UsageError("prompts is empty: there is nothing to record or to check")
    return [_plain(prompt, index) for index, prompt in enumerate(prompts)]


def _plain(prompt: Any, index: int) -> Any:
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
        others = sorted(set(prompt) - {"prompt_token_ids", "prompt"})
        if others:
            raise UsageError(f"prompts[{index}] has {others[0]!r}, which is not supported")
        prompt = prompt["prompt_token_ids"]
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt):
        if all(isinstance(item, Mapping) and "role" in item for item in prompt):
            try:
                messages: list[Any] = json.loads(json.dumps([dict(item) for item in prompt]))
            except TypeError as error:
                raise UsageError(f"prompts[{index}] has a message that is not JSON: {error}") from None
            return messages
        if all(hasattr(item, "__index__") and not isinstance(item, bool) for item in prompt):
            return [int(item) for item in prompt]
    raise UsageError(
        f"prompts[{index}] is neither a string, a list of token ids nor a list of messages, or it is empty: {prompt!r:.80}"
    )


def tokenize(prompts: Sequence[Any], tokenizer: Any) -> list[Prompt]:
    """Token ids of prompts that `check_prompts` has passed. `tokenizer` may be None: prompts as token ids need none.

    Raises UsageError naming the prompt that does not work.
    """
    return [_tokenize_one(prompt, tokenizer, f"prompts[{index}]") for index, prompt in enumerate(prompts)]


def _is_hole(message: Mapping[str, Any]) -> bool:
    """Whether a message is a turn for the engine to write: an assistant's with nothing in it, tool calls neither."""
    return message["role"] == "assistant" and not [k for k, v in message.items() if k != "role" and v is not None]


def _tokenize_one(prompt: Any, tokenizer: Any, where: str) -> Prompt:
    if not isinstance(prompt, str) and isinstance(prompt[0], int):
        return Prompt(tuple(prompt))
    if tokenizer is None:
        kind = "a text" if isinstance(prompt, str) else "a list of messages"
        raise UsageError(f"{where} is {kind}, and the model's folder has no tokenizer: give the prompt as token ids")
    if isinstance(prompt, str):
        return Prompt(tuple(tokenizer(prompt)["input_ids"]))
    messages: list[dict[str, Any]] = [dict(message) for message in prompt]
    if _is_hole(messages[-1]):
        messages.pop()  # the last hole is what add_generation_prompt opens
    for message in messages:
        if _is_hole(message):
            message["content"] = _HOLE
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like
        raise UsageError(f"{where}: the chat template refuses it: {str(error).splitlines()[0]}") from None
    turns = [tuple(tokenizer.encode(part, add_special_tokens=False)) for part in text.split(_HOLE)]
    if len(turns) - 1 != sum(message.get("content") == _HOLE for message in messages):
        raise UsageError(
            f"{where}: the chat template rewrites or drops earlier turns; give that rollout as token ids with a mask"
        )
    return Prompt(turns[0], tuple(turns[1:]))
