"""The far end: runs in a cell's own environment, which has an engine, numpy and safetensors, and nothing else of ours.

python -m pytest_logprob_parity.matrix.worker JOB_FOLDER

The folder has `job.json` and the goldens to check; the answers are written beside them, `done.json` last.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from ..atomic import write_whole
from ..check.ask import Answers, ask
from ..check.measure import Measured, measure
from ..engines.pool import Pool
from ..errors import ParityError
from ..golden import Golden
from ..spec import EngineSpec, Sampling
from ..trace import FloatArray, Trace
from ..trace.file_format import read, write

_POLICY, _DRAWN, _OWN = "policy_logprobs", "drawn_logprobs", "own_logprobs"


def work(folder: Path) -> None:
    """Do the job: record goldens, then answer for those that are there. Raises ParityError."""
    job = json.loads((folder / "job.json").read_text("utf-8"))
    spec = EngineSpec(job["model"], **job["spec"])
    with Pool(Path(job["root"]), lambda line: print(line, flush=True)) as pool:
        engine = pool.engine(spec)
        for name, sampling in job["record"].items():
            given = Sampling.of(sampling)
            measured = measure(engine, job["prompts"], given, ("decode",), job["repeats"], "the golden of this cell")
            save_recorded(folder, name, measured)
        for name in job["check"]:
            golden = Golden.load(folder / f"{name}.golden.safetensors")
            save_answers(folder, name, ask(engine, golden, ("decode", "regenerate")))
        config = engine.config
        told = {"engine": config.engine, "version": config.version, "config": dict(config.values)}
    write_whole(folder / "done.json", json.dumps(told, default=str).encode())


def save_recorded(folder: Path, name: str, measured: Measured) -> None:
    """Write a golden that is not yet judged, named after the sampling: to judge needs more than a worker has."""
    measured.golden.save(folder / f"{name}.golden.safetensors")
    if measured.own is not None:
        write(folder / f"{name}.own.safetensors", {_OWN: measured.own}, {})


def load_recorded(folder: Path, name: str) -> tuple[Golden, FloatArray | None]:
    """A golden that `save_recorded` wrote, to be judged, and its replay on its own schedule where it has a noise floor.

    Raises GoldenError for files that are missing or damaged.
    """
    golden = Golden.load(folder / f"{name}.golden.safetensors")
    return golden, None if golden.floor is None else read(folder / f"{name}.own.safetensors")[0][_OWN]


def save_answers(folder: Path, name: str, answers: Answers) -> None:
    """Write answers to files named after the sampling."""
    for path, trace in answers.replays.items():
        trace.save(folder / f"{name}.{path}.safetensors")
    columns = {} if answers.policy_logprobs is None else {_POLICY: answers.policy_logprobs}
    if answers.draw is not None:
        columns[_DRAWN] = answers.draw()
    about = {"fingerprint": answers.fingerprint, "paths": list(answers.replays), "unforced": answers.unforced}
    write(folder / f"{name}.more.safetensors", columns, about)


def load_answers(folder: Path, name: str) -> Answers:
    """The inverse of `save_answers`. Raises GoldenError for files that are missing or damaged."""
    columns, metadata = read(folder / f"{name}.more.safetensors")
    replays = {path: Trace.load(folder / f"{name}.{path}.safetensors") for path in metadata["paths"]}
    drawn = columns.get(_DRAWN)
    return Answers(
        replays=replays,
        fingerprint=metadata["fingerprint"],
        policy_logprobs=columns.get(_POLICY),
        draw=None if drawn is None else lambda: drawn,
        unforced=str(metadata.get("unforced", "")),
    )


def main() -> None:
    """Run the job of the folder that is named; what goes wrong becomes `failed.json`, in one line."""
    folder = Path(sys.argv[1])
    # One CPU build refuses to start where this says nothing of an allocator that only makes it faster.
    os.environ["LD_PRELOAD"] = ":".join([os.environ.get("LD_PRELOAD", ""), "libtcmalloc", "libiomp"])
    try:
        work(folder)
    except ParityError as error:
        (folder / "failed.json").write_text(json.dumps({"reason": str(error)}), "utf-8")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
