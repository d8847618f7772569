"""A real `logprob-parity serve` for the tests of some modules, behind a key."""

import contextlib
import os
import signal
import subprocess
import threading
import time
import urllib.request

from conftest import MODEL, ROOT, forked_python

KEY = "key-of-this-server"
SECRET = "hf_token-of-this-server"
#: A server that has not answered by then (seconds) hangs.
_HANGS = 240


@contextlib.contextmanager
def serving(*arguments, **environment):
    """The address of a server of the tiny model in float32, once it answers; it ends with the block.

    Raises AssertionError for one that ends before, TimeoutError for one that hangs.
    """
    command = [forked_python(), "-m", "pytest_logprob_parity.cli", "serve", MODEL, "--dtype", "float32", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--api-key", KEY, *arguments], env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        url = next(line.split()[-1] for line in process.stdout if "it will listen at" in line)
        threading.Thread(target=process.stdout.read, daemon=True).start()
        _wait(process, url)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _wait(process, url):
    end = time.monotonic() + _HANGS
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            assert process.poll() is None, f"the server ended with {process.poll()}"
            if time.monotonic() > end:
                raise TimeoutError(f"the server at {url} does not answer") from None
            time.sleep(0.2)
