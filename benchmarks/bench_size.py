"""Bytes of a golden on disk against the bytes of its columns: one recorded from a real engine, one of a million tokens."""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import REPO, SAMPLING, SPEC, arith_prompts, report_number, synthetic_trace

from pytest_logprob_parity.check.check import check_golden
from pytest_logprob_parity.engines.pool import open_engine
from pytest_logprob_parity.golden import Golden


def report_size(name: str, path: Path) -> None:
    golden, size = Golden.load(path), path.stat().st_size
    trace = golden.trace
    raw = sum(column.nbytes for column in trace.to_columns().values())
    raw += 0 if golden.floor is None else golden.floor.logprobs.nbytes
    per_token = f"{size / trace.num_tokens:.2f} against {raw / trace.num_tokens:.2f} bytes a token"
    detail = f"{per_token}, {size - raw:,} bytes of header, {trace.num_tokens:,} tokens, top-{trace.top_k}"
    report_number(f"size on disk / raw columns, {name}", size / raw, 1.03, detail)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "golden.safetensors"
        with open_engine(SPEC, root=REPO) as engine:
            check_golden(path, engine, prompts=arith_prompts(), sampling=SAMPLING, update=True)
        report_size("recorded", path)
        Golden(trace=synthetic_trace()).save(path)
        report_size("synthetic", path)


if __name__ == "__main__":
    main()
