"""`logprob-parity serve`: vLLM's own OpenAI server, as tests can ask it."""

from __future__ import annotations

import argparse

from .verb import Verbs, add_verb


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = add_verb(
        verbs,
        "serve",
        "start vLLM's own OpenAI server, as tests can ask it: --parity-server=URL",
        "It runs with a profile's pinned defaults, and can be forced along given tokens (teacher-forced decode).",
        run=run,
        status={0: "ended by a signal"},
    )
    verb.add_argument("model", help="model folder or hub id")
    verb.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="EngineSpec fields, engine arguments")
    verb.add_argument("--set", action="append", default=[], dest="also", metavar="KEY=VALUE", help="the same, anywhere")
    verb.add_argument("--profile", default="rl", help="pinned defaults (default: %(default)s)")
    verb.add_argument("--dtype", default="auto", help="of the weights (default: %(default)s, the checkpoint's)")
    verb.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine only)")
    verb.add_argument("--port", type=int, default=8000, help="0: one that is free (default: %(default)s)")
    verb.add_argument(
        "--weight-updates",
        action="store_true",
        help="open vLLM's weight API (its development mode), on an address of this machine only",
    )
    others = "Any other option is handed to vLLM's server: --tensor-parallel-size 8, --distributed-executor-backend ray."
    verb.epilog = f"{others} {verb.epilog}"


def run(given: argparse.Namespace) -> int:
    """Serve until interrupted. Gives the server's exit status."""
    from ..engines.server.serve import serve
    from ..spec.settings import parse_settings

    settings = {"model": given.model, "profile": given.profile, "dtype": given.dtype}
    settings |= parse_settings([*given.settings, *given.also], "serve")
    return serve(settings, given.host, given.port, given.flags, weight_updates=given.weight_updates)
