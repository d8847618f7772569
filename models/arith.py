"""Small arithmetic word problems, their worked answers, and the reward: the world the tiny models were trained in."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ida", "Jon", "Kim", "Leo")
THINGS = ("apples", "books", "coins", "cards", "eggs", "keys", "nuts", "pens", "pears", "shells", "stamps", "toys")
OPENINGS = ("", "First, ", "Let us see. ", "We count: ")
SECOND_STEPS = ("", "Then ", "After that, ", "Next, ")
CLOSINGS = ("The answer is {}.", "So the answer is {}.", "That makes {}.")

CALCULATOR_HINT = " Use the calculator."


@dataclass(frozen=True)
class Problem:
    """One word problem of two steps, `a op b` and then `op c`."""

    question: str
    steps: tuple[tuple[int, str, int, int], ...]

    @property
    def answer(self) -> int:
        return self.steps[-1][3]


def make_problem(rng: random.Random) -> Problem:
    """A fresh problem: numbers up to 99, results from 0 to 198."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    other = rng.choice([n for n in NAMES if n != name])
    kind = rng.randrange(4)
    if kind == 0:
        a, b = rng.randint(2, 99), rng.randint(2, 99)
        c = rng.randint(1, min(99, a + b))
        text = f"{name} has {a} {thing} and buys {b} more. {name} gives {c} to {other}. How many {thing} are left?"
        steps = ((a, "+", b, a + b), (a + b, "-", c, a + b - c))
    elif kind == 1:
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        c = rng.randint(1, 99)
        text = f"{name} fills {a} bags with {b} {thing} each and finds {c} more. How many {thing} does {name} have?"
        steps = ((a, "*", b, a * b), (a * b, "+", c, a * b + c))
    elif kind == 2:
        a = rng.randint(20, 99)
        b = rng.randint(1, a)
        c = rng.randint(2, 99)
        text = f"{name} had {a} {thing} and lost {b}. Then {other} brought {c}. How many {thing} does {name} have now?"
        steps = ((a, "-", b, a - b), (a - b, "+", c, a - b + c))
    else:
        a, b = rng.randint(2, 99), rng.randint(2, 50)
        text = f"{name} has {a} {thing}. {other} has {b} more than {name}. How many {thing} do they have together?"
        steps = ((a, "+", b, a + b), (a, "+", a + b, a + a + b))
        if steps[1][3] > 198:
            return make_problem(rng)
    return Problem(text, steps)


def make_answer(problem: Problem, rng: random.Random) -> str:
    """The worked answer, phrased in one of several ways: what makes some positions of the model uncertain."""
    (a, op1, b, r1), (c, op2, d, r2) = problem.steps
    first = rng.choice(OPENINGS) + f"{a} {op1} {b} = {r1}. "
    second = rng.choice(SECOND_STEPS) + f"{c} {op2} {d} = {r2}. "
    return first + second + rng.choice(CLOSINGS).format(r2)


def make_messages(rng: random.Random, turns: int) -> list[dict[str, str]]:
    """A conversation of `turns` problems with their answers; one in eight asks a calculator tool."""
    messages: list[dict[str, str]] = []
    for _ in range(turns):
        problem = make_problem(rng)
        if rng.random() < 0.125:
            messages.append({"role": "user", "content": problem.question + CALCULATOR_HINT})
            for a, op, b, result in problem.steps:
                messages.append({"role": "assistant", "content": f"{a} {op} {b}"})
                messages.append({"role": "tool", "content": str(result)})
            messages.append({"role": "assistant", "content": rng.choice(CLOSINGS).format(problem.answer)})
        else:
            messages.append({"role": "user", "content": problem.question})
            messages.append({"role": "assistant", "content": make_answer(problem, rng)})
    return messages


def reward(problem: Problem, completion: str) -> float:
    """1.0 where the last number of the completion is the answer, else 0.0."""
    numbers = re.findall(r"\d+", completion)
    return float(bool(numbers) and int(numbers[-1]) == problem.answer)
