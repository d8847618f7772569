"""Prompts of one length for any model with a tokenizer: chains of worked word problems, long enough to move batch noise."""

from __future__ import annotations

import random
from typing import Any, Final

from ..errors import UsageError

#: Prompts of 156 tokens and more are what makes other batch shapes move bfloat16's numbers.
LENGTH: Final = 160
_NAMES: Final = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ida", "Jon")
_THINGS: Final = ("apples", "books", "coins", "cards", "eggs", "keys", "nuts", "pens")


def make_prompts(tokenizer: Any, count: int, length: int = LENGTH, seed: int = 0) -> list[list[int]]:
    """`count` prompts of exactly `length` token ids: the end of a conversation whose last question is open.

    Raises UsageError where the tokenizer makes nothing of the text.
    """
    rng = random.Random(seed)
    if tokenizer is None:
        raise UsageError("selftest: the model's folder has no tokenizer to make prompts with: give --golden GOLDEN")
    return [_prompt(tokenizer, length, rng) for _ in range(count)]


def _prompt(tokenizer: Any, length: int, rng: random.Random) -> list[int]:
    messages: list[dict[str, str]] = []
    while True:
        question, answer = _problem(rng)
        messages.append({"role": "user", "content": question})
        ids = _ids(tokenizer, messages)
        if len(ids) >= length:
            return ids[-length:]
        if len(messages) > 2 * length:
            raise UsageError("the tokenizer makes too few tokens of the selftest's prompts")
        messages.append({"role": "assistant", "content": answer})


def _problem(rng: random.Random) -> tuple[str, str]:
    name, other = rng.sample(_NAMES, 2)
    thing, a, b = rng.choice(_THINGS), rng.randint(2, 99), rng.randint(2, 99)
    c = rng.randint(1, min(99, a + b))
    question = f"{name} has {a} {thing} and buys {b} more. {name} gives {c} to {other}. How many {thing} are left?"
    return question, f"{a} + {b} = {a + b}. {a + b} - {c} = {a + b - c}. The answer is {a + b - c}."


def _ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        text = "\n".join(message["content"] for message in messages) + "\n"
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
