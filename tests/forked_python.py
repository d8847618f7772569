"""A Python for tests that start many processes: it runs `-m MODULE` in a fork of a process that has imported torch and vLLM.

    sh:    FORKED_PYTHON_HOME=folder python -I -S tests/forked_python.py -m pytest -q       # as `python -m pytest -q`

With `-X fork -c CODE` it runs code there. Each set of variables that OpenMP reads has a process of its own to fork from, which
starts when it is first needed and ends with the process whose number is in `folder/owner`. What a fork cannot do is left to a
new Python: modules that it is not meant for, `-c` alone but for the line that starts a worker of pytest-xdist, and whatever
comes while there is nobody to fork from. Signals go to the child; it dies with whoever started it.

A test of imports, of what a newcomer runs or of a kill takes `sys.executable`.
"""

import array
import contextlib
import fcntl
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

#: What may run in a fork, and what is imported for it beforehand.
ENGINES = (
    "numpy",
    "scipy.stats",
    "jinja2",
    "pytest",
    "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.engine.core",
)
#: What execnet's `popen` runs with -c.
WORKER = "import sys;exec(eval(sys.stdin.readline()))"
CODE = ["-X", "fork", "-c"]
MODULES = {
    "pytest": ENGINES,
    "-c": ENGINES,
    WORKER: ENGINES,
    "pytest_logprob_parity.cli": ENGINES,
    "pytest_logprob_parity.matrix.worker": (
        "numpy", "torch", "transformers", "transformers.models.qwen3.modeling_qwen3", "transformers.generation.utils",
    ),
}  # fmt: skip
READ_AT_IMPORT = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "PYTHONHASHSEED", "VLLM_LOGGING_LEVEL", "TORCHINDUCTOR_")
#: What these imports set where nobody has, and what a start of an engine sets besides: whoever has imported them or has an
#: engine asks for the same process as whoever has not.
SET_BY_IMPORTS = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
SET_BY_ENGINES = ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS")


# -- who asks --------------------------------------------------------------------------------------------------------------


def ask(arguments):
    """Run it in a fork and end as it ends; returns where that cannot be."""
    home = os.environ.get("FORKED_PYTHON_HOME", "")
    if arguments[:1] == ["-mpytest"]:
        arguments = ["-m", "pytest", *arguments[1:]]
    if arguments == ["-u", "-c", WORKER]:
        arguments = ["-m", WORKER]
    if arguments[:3] == CODE:
        arguments = ["-m", "-c", *arguments[3:]]
    if not home or arguments[:1] != ["-m"] or arguments[1] not in MODULES:
        return
    read = {k: v for k, v in os.environ.items() if k.startswith(READ_AT_IMPORT) and k not in SET_BY_ENGINES}
    key = [MODULES[arguments[1]], {**SET_BY_IMPORTS, **read}]
    place = f"{home}/{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]}"
    try:
        line = connect(place) or begin(place, key[0])
        message = json.dumps([arguments[1:], dict(os.environ), str(Path.cwd())]).encode()
        line.sendmsg([len(message).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
        line.sendall(message)
    except OSError:
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: line.sendall(b"%d\n" % number))
    told = b""
    while not told.endswith(b"\n"):
        more = line.recv(64)
        if not more:
            os._exit(70)
        told += more
    code = int(told)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def connect(place):
    line = socket.socket(socket.AF_UNIX)
    try:
        line.connect(place)
    except OSError:
        return None
    return line


def begin(place, modules):
    """Start the process to fork from, unless somebody else just has."""
    with Path(f"{place}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (line := connect(place)):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(place)
            listener.listen(64)  # who connects from now on waits for the imports
            quiet = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") or k == "PYTHONHASHSEED"}
            for name in SET_BY_ENGINES:
                quiet.pop(name, None)
            with Path(f"{place}.log").open("w") as log:
                subprocess.Popen(
                    [sys.executable, str(Path(__file__).resolve()), "--serve", str(listener.fileno()), *modules],
                    pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    env=quiet, cwd="/",
                )  # fmt: skip
            line = connect(place)
        return line


# -- who forks -------------------------------------------------------------------------------------------------------------


def serve(listener, modules):
    import gc
    import importlib
    import select
    import warnings

    warnings.simplefilter("ignore", DeprecationWarning)
    before = dict(os.environ)
    base = [entry for entry in sys.path if entry != str(Path(__file__).resolve().parent)]
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    for name in modules:
        importlib.import_module(name)
    if "pytest" in modules:  # that what plugins come with is imported already is our doing
        from _pytest.assertion.rewrite import AssertionRewritingHook

        AssertionRewritingHook._warn_already_imported = lambda self, name: None
    imported = {name: value for name, value in os.environ.items() if before.get(name) != value}  # as each Python would set it
    gc.collect()
    gc.freeze()
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    lines = {}
    owner = Path(os.environ["FORKED_PYTHON_HOME"], "owner").read_text()
    while Path("/proc", owner).exists():
        ready, _, _ = select.select([listener, ended, *lines.values()], [], [], 1)
        if listener in ready:
            line, _ = listener.accept()
            request = receive(line)
            if request:
                pid = os.fork()
                if not pid:
                    for other in lines.values():
                        other.close()
                    become(request, base, imported, [listener, line, ended, wake])
                for fd in request[1]:
                    os.close(fd)
                lines[pid] = line
        if ended in ready:
            os.read(ended, 4096)
        while lines:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            with lines.pop(pid) as line:
                tell(line, b"%d\n" % os.waitstatus_to_exitcode(status))
        for pid, line in lines.items():
            if line in ready:
                numbers = line.recv(64).split() or [signal.SIGKILL]
                for number in numbers:
                    os.kill(pid, int(number))
    os._exit(0)


def tell(line, text):
    with contextlib.suppress(OSError):
        line.sendall(text)


def receive(line):
    """What is to run, and where its streams are; None where whoever asked has gone."""
    try:
        length, fds, _, _ = socket.recv_fds(line, 4, 3)
        size, message = int.from_bytes(length, "big"), b""
        while len(message) < size:
            message += line.recv(size - len(message))
        return (json.loads(message), fds) if len(fds) == 3 else None
    except OSError:
        return None


def become(request, base, imported, to_close):
    """Be `python -m MODULE ARGUMENTS` in its folder and its environment, to the end."""
    import atexit
    import runpy
    import threading
    import traceback

    (arguments, environment, folder), fds = request
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()
    for thing in to_close:
        os.close(thing) if isinstance(thing, int) else thing.close()
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update({**imported, **environment})
    os.chdir(folder)
    sys.path[:] = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *base]
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    sys.argv[:] = arguments
    code = 0
    try:
        if arguments[0] == WORKER:
            exec(WORKER, {"__name__": "__main__"})
        elif arguments[0] == "-c":
            exec(sys.argv.pop(1), {"__name__": "__main__"})
        else:
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if not (end.code is None or isinstance(end.code, int)):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 255)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(socket.socket(fileno=int(sys.argv[2])), sys.argv[3:])
    ask(sys.argv[1:])
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
