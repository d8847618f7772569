"""Loading and comparing two goldens of a million tokens with top-20, against reading the files and summing their bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from common import moved, report_ratio, synthetic_trace, time_in_turns

from pytest_logprob_parity.comparison.compare import compare
from pytest_logprob_parity.golden import Golden

ROUNDS = 15


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "expected.safetensors", Path(folder) / "actual.safetensors"]
        trace = synthetic_trace()
        for path, written in zip(paths, (trace, moved(trace, sigma=0.01)), strict=True):
            Golden(trace=written).save(path)
        del trace, written

        def load_and_compare() -> object:
            expected, actual = (Golden.load(path).trace for path in paths)
            return compare(expected=expected, actual=actual)

        def read_and_sum() -> object:
            return [np.frombuffer(path.read_bytes(), np.uint8).sum() for path in paths]

        print(f"two files of {paths[0].stat().st_size / 1e6:.0f} MB; {load_and_compare().headline}")  # type: ignore[attr-defined]
        times = time_in_turns({"compare": load_and_compare, "sum": read_and_sum}, rounds=ROUNDS)
        report_ratio("load both and compare / read both and sum", times["compare"], times["sum"], 3)


if __name__ == "__main__":
    main()
