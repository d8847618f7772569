"""What recording the experts of each token costs, and how far healthy runs of a mixture of experts route alike.

    python benchmarks/bench_routing.py [FOLDER ...] [--rounds N] [--no-times]

For models/tiny-arith-moe, or the mixtures in each FOLDER (benchmarks/bench_models.py makes some). The times are of one
engine object: its recording pass with its routers watched, and the same pass with vLLM's own routers, in turns, by the
processor's time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import REPO, arith_prompts, report_ratio, share_the_machine, time_in_turns

share_the_machine()

from pytest_logprob_parity.comparison.alignment import align  # noqa: E402
from pytest_logprob_parity.comparison.expert_routing import routing_agreement  # noqa: E402
from pytest_logprob_parity.engines.pool import Pool  # noqa: E402
from pytest_logprob_parity.engines.replay import forced_request  # noqa: E402
from pytest_logprob_parity.spec import EngineSpec, Sampling  # noqa: E402
from pytest_logprob_parity.trace import Trace  # noqa: E402

SAMPLING = Sampling(temperature=0.7, max_tokens=64, n=4, seed=1, logprobs=5)
ROUTERS = "_logprob_parity_routers"


def without_watch(pool: Pool, spec: EngineSpec, work: Callable[[], Any]) -> Callable[[], Any]:
    """`work` with vLLM's own routers and without anything kept of them."""
    backend: Any = pool.backend(spec)

    def bare() -> Any:
        worker = backend.on_worker(lambda worker: worker)[0]
        runner = worker.model_runner
        routers = [m.router for m in runner.model.modules() if hasattr(getattr(m, "router", None), "_compute_routing")]
        watched = [vars(router).pop("_compute_routing") for router in routers]
        backend._routed = False
        try:
            return work()
        finally:
            backend._routed = True
            for router, compute in zip(routers, watched, strict=True):
                router._compute_routing = compute

    return bare


def in_other_batches(backend: Any, trace: Trace) -> Iterator[tuple[str, Trace]]:
    """Forced decodes of `trace` in other batches: each sequence alone, and in fives from the last to the first."""
    segments = list(trace.segments())[::-1]
    for name, size in (("one by one", 1), ("in fives, backwards", 5)):
        columns = {
            column: np.copy(getattr(trace, column))
            for column in ("logprobs", "routed_experts", "router_margins", "router_inputs")
        }
        for start in range(0, len(segments), size):
            batch = segments[start : start + size]
            for segment, answer in zip(
                batch, backend.run([forced_request(trace, s, tells_kept=True) for s in batch]), strict=True
            ):
                rows = slice(segment.start, segment.stop)
                columns["logprobs"][rows] = answer.logprobs
                columns["routed_experts"][rows] = answer.routing.experts
                columns["router_margins"][rows] = answer.routing.margins
                columns["router_inputs"][rows] = answer.routing.inputs
        yield name, trace.with_(**columns)


def show(name: str, expected: Trace, actual: Trace) -> None:
    routing = routing_agreement(expected, actual, align(expected, actual))
    assert routing is not None
    layers = " ".join(f"{share:.2%}" for share in routing.agreement)
    numbers = routing.numbers
    print(
        f"{name}: same experts by layer {layers}; tokens with others: {int(routing.flips.sum())} of {routing.tokens}, at a tie "
        f"{int(routing.ties.sum())}, given something else {int(routing.given.sum())}, chosen otherwise "
        f"{int(routing.chosen.sum())}; RMS {numbers['rms_diff_same_experts']:.2g} nats with the same experts, "
        f"{numbers['rms_diff_other_experts']:.2g} with others, which carry {numbers['share_by_other_experts']:.0%}",
        flush=True,
    )


def bench(model: Path, rounds: int) -> None:
    with Pool(REPO, print) as pool:
        traces = {}
        for dtype in ("float32", "bfloat16"):
            spec = EngineSpec(str(model), dtype=dtype)
            engine, prompts = pool.engine(spec), arith_prompts()
            trace = traces[dtype] = engine.generate(prompts, SAMPLING)
            assert trace.routed_experts is not None, f"{model}: no routing"
            bytes_each = sum(
                column.nbytes for name, column in trace.to_columns().items() if name.startswith(("routed", "router"))
            )
            print(
                f"{model.name} {dtype}: {trace.num_tokens} tokens, [layers, experts per token] "
                f"{list(trace.routed_experts.shape[1:])}, {bytes_each / trace.num_tokens:.0f} bytes of routing a token",
                flush=True,
            )
            for name, other in in_other_batches(pool.backend(spec), trace):
                show(f"{model.name} {dtype}, {name}", trace, other)
            if dtype == "bfloat16":
                show(f"{model.name}, float32's tokens in bfloat16", traces["float32"], engine.replay(traces["float32"]))
                if rounds:
                    record = lambda: engine.generate(prompts, SAMPLING)  # noqa: E731, B023
                    works = {"watched": record, "bare": without_watch(pool, spec, record)}
                    times = time_in_turns(works, rounds=rounds, clock=time.process_time)
                    report_ratio(f"{model.name}: recording pass with routing / without", times["watched"], times["bare"], 1.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[REPO / "models" / "tiny-arith-moe"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-times", action="store_true")
    arguments = parser.parse_args()
    for folder in arguments.folders:
        bench(folder, 0 if arguments.no_times else arguments.rounds)


if __name__ == "__main__":
    main()
