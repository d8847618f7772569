"""How long a diagnosis takes: signatures of an 11,200-token comparison (bar 1 s for 10,000), and an ablation of eight
settings (bar 3 minutes), which has to find the two that matter.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from common import REPO, SPEC, long_prompts, report_number, share_the_machine, synthetic_trace, time_in_turns

from pytest_logprob_parity.check.check import check_golden
from pytest_logprob_parity.comparison.alignment import align
from pytest_logprob_parity.comparison.signatures.semantics import semantic_findings
from pytest_logprob_parity.diagnosis.ablation import Budget, ablate
from pytest_logprob_parity.engines.pool import Pool
from pytest_logprob_parity.golden import Golden
from pytest_logprob_parity.spec import Sampling

#: Two that matter, six that do not.
FAILING = {
    "logprobs_mode": "raw_logprobs",
    "kv_cache_dtype": "fp8_e5m2",
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "max_num_seqs": 17,
    "max_num_batched_tokens": 2048,
    "block_size": 32,
    "hf_overrides": {"head_dtype": "float32"},
}
MATTER = {"logprobs_mode", "kv_cache_dtype"}


def signatures() -> None:
    golden = synthetic_trace(sequences=56, length=200, k=20)
    normaliser = np.log(np.exp(0.7 * golden.top_logprobs).sum(axis=1)) + 0.1  # what is not listed has its part
    scaled = golden.with_(
        logprobs=0.7 * golden.logprobs - normaliser, top_logprobs=0.7 * golden.top_logprobs - normaliser[:, None]
    )
    rows = align(golden, scaled)
    times = time_in_turns({"signatures": lambda: semantic_findings(golden, scaled, rows)}, rounds=7)["signatures"]
    (finding,) = [f for f in semantic_findings(golden, scaled, rows) if f.cause == "temperature"]
    print(f"{golden.num_tokens:,} tokens, top-{golden.top_k}: {finding}")
    report_number("signatures of 11,200 tokens / 1 s", sorted(times)[3], 1, f"{sorted(times)[3]:.3f} s, median of 7")


def ablation(folder: Path) -> None:
    path = folder / "golden.safetensors"
    with Pool(REPO, print) as pool:
        engine = pool.engine(SPEC)
        sampling = Sampling(temperature=0.7, max_tokens=32, n=4, seed=1)
        check_golden(path, engine, prompts=long_prompts(engine.tokenizer, 12, 128), sampling=sampling, update=True, repeats=3)
        failing = SPEC.replace(**FAILING)
        pool.backend(failing)  # it runs already where a check has failed
        began = time.monotonic()
        found = ablate(Golden.load(path), failing, pool, Budget(engines=20), lambda _: None, read=False)
        seconds = time.monotonic() - began
    print("\n".join(found.describe()))
    helped = set(found.best.moved)
    report_number("ablation of eight settings / 3 minutes", seconds / 180, 1, f"{seconds:.0f} s, {len(found.steps)} engines")
    report_number("settings that matter, missed or invented", len(helped ^ MATTER), 0, ", ".join(sorted(helped)))


if __name__ == "__main__":
    share_the_machine()
    signatures()
    with tempfile.TemporaryDirectory() as name:
        ablation(Path(name))
