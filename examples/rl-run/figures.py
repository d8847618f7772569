"""The article's figures, drawn from metrics.json: what an RL team watches, by step and arm.

python examples/rl-run/figures.py build/rl-run
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

PANELS = {
    "clipped": "clip fraction (sequences)",
    "rl/clamp_log_ratio_new_old_indicator": "ratio outside 1 ± 0.02 (tokens)",
    "rl/kl_new_old": "KL new-old (nats a token)",
    "rl/ratio_new_old": "policy ratio",
    "rl/ess": "effective sample size",
    "entropy": "entropy (nats)",
    "lag": "lag (weight versions)",
    "reward": "reward",
}
LOGARITHMIC = {"rl/kl_new_old"}


def draw(results: Mapping[str, Any], out: Path) -> None:
    """Write figures.svg to `out`: one panel for each number."""
    mpl.rcParams.update({"svg.hashsalt": "rl-run", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.4), layout="constrained")
    for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
        for arm, result in results.items():
            rows = result["steps"]
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=arm, linewidth=1.2)
        axis.set_title(title)
        axis.set_xlabel("step")
        if name in LOGARITHMIC:
            axis.set_yscale("log")
            axis.set_ylim(bottom=1e-5)  # the first step of the reference, on its own weights, is far below
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(results), frameon=False)
    figure.savefig(out / "figures.svg", metadata={"Date": None})


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    draw(json.loads((folder / "metrics.json").read_text("utf-8")), folder)
