"""What a repo that trains with RL has anyway: its prompts, and how it samples rollouts."""

PROMPTS = [
    [{"role": "user", "content": question}]
    for n in (12, 18, 23, 31)
    for question in (
        f"Ada has {n} apples and buys 30 more. Ada gives 7 to Ben. How many apples are left?",
        f"Dan fills 6 bags with {n} nuts each and finds 15 more. How many nuts does Dan have?",
        f"Eve had {n + 59} coins and lost 26. Then Gus brought 40. How many coins does Eve have now?",
        f"Kim has {n} books. Leo has 9 more than Kim. How many books do they have together?",
    )
]

SAMPLING = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 64, "n": 4, "seed": 1}
