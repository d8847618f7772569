"""The child process of an engine: it starts one engine, and answers until its line closes."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.connection import Connection
from typing import Any

from ..errors import ParityError
from ..reasons import RemoteError, reason_of
from .backend import Backend
from .kinds import start_in_process


def main(descriptor: int, *, last: bool = False) -> Backend | None:
    """Start one engine, answer on the file descriptor until the line closes.

    `last`: nothing of the process runs after this. An engine on CPUs that has no children of its own needs no shutting down
    then, which takes half a second: it is returned as it is, for the caller to hold.
    """
    connection: Connection[Any, Any] = Connection(descriptor)
    backend: Backend | None = None
    try:
        while True:
            try:
                verb, *arguments = connection.recv()
            except EOFError:
                break
            try:
                if verb == "start":
                    backend = start_in_process(*arguments)
                    connection.send((None, backend.config))
                else:
                    assert backend is not None
                    connection.send((None, getattr(backend, verb)(*arguments)))
            except ParityError as error:
                connection.send((type(error)(str(error)), None))
            except Exception as error:
                connection.send((RemoteError(reason_of(error)), None))
    finally:
        if backend is not None and not (last and not multiprocessing.active_children()):
            backend.close()
    return backend


if __name__ == "__main__":
    main(int(sys.argv[1]))
