"""The trainer's side: its logprobs of the tokens that an engine wrote, its metrics, and whether the two agree."""
