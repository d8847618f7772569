"""A gateway on loopback before a real server: what it lets through is real, what it spoils is what servers do on bad days."""

import contextlib
import http.client
import json
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMPLETIONS = "/v1/completions"
GENERATE = "/inference/v1/generate"


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class Gateway:
    """`before(number, path)` may answer itself with (status, text) or "drop" the connection; `after(content)` edits the JSON
    of a completion in place. `edit(path, body)` gives the path and body (bytes) that are handed on. `number` counts the
    requests of one path, from 0. `hidden` are beginnings of paths that are not there, `delay` are seconds before each
    completion, `most` is how many requests were under way at a time. Answers of the generate route are streamed on.
    """

    def __init__(self, upstream):
        self.upstream = urlsplit(upstream)
        self.heal()
        self._server = Listener(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def heal(self):
        """Let everything through as it is."""
        self.before = lambda number, path: None
        self.after = lambda content: None
        self.edit = lambda path, body: (path, body)
        self.hidden = ()
        self.delay = 0.0
        self.most = 0
        self._counts = {}
        self._open = 0
        self._lock = threading.Lock()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def forward(self, method, path, body, headers):
        connection = http.client.HTTPConnection(self.upstream.hostname, self.upstream.port, timeout=60)
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        answer = response.status, response.read(), response.getheader("content-type", "")
        connection.close()
        return answer

    def stream(self, path, body, headers, handler):
        """Hand the pieces of one answer on as they come."""
        connection = http.client.HTTPConnection(self.upstream.hostname, self.upstream.port, timeout=60)
        connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        handler.close_connection = True
        handler.send_response(response.status)
        handler.send_header("Content-Type", response.getheader("content-type", ""))
        handler.send_header("Connection", "close")
        handler.end_headers()
        while piece := response.read1(65536):
            handler.wfile.write(piece)
        connection.close()

    def answer(self, method, path, body, headers):
        plain = path.partition("?")[0]
        with self._lock:
            number = self._counts.get(plain, 0)
            self._counts[plain] = number + 1
            self._open += 1
            self.most = max(self.most, self._open)
        try:
            if plain.startswith(self.hidden or ("\0",)):
                return 404, b'{"detail": "Not Found"}', "application/json"
            said = self.before(number, plain)
            if said is not None:
                return said if said == "drop" else (said[0], said[1].encode(), "text/html")
            end = time.monotonic() + self.delay
            while plain == COMPLETIONS and self.delay and time.monotonic() < end:
                time.sleep(0.01)
            path, body = self.edit(path, body)
            status, content, kind = self.forward(method, path, body, headers)
            if status == 200 and plain == COMPLETIONS:
                edited = json.loads(content)
                self.after(edited)
                content = json.dumps(edited).encode()
            return status, content, kind
        finally:
            with self._lock:
                self._open -= 1

    def _handler(gateway):  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                key = self.headers.get("authorization")
                if self.command == "POST" and self.path == GENERATE and not GENERATE.startswith(gateway.hidden or ("\0",)):
                    gateway.stream(self.path, body, {} if key is None else {"Authorization": key}, self)
                    return
                said = gateway.answer(self.command, self.path, body, {} if key is None else {"Authorization": key})
                if said == "drop":
                    self.close_connection = True
                    return
                status, content, kind = said
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *_):
                pass

            def handle(self):
                with contextlib.suppress(ConnectionError):  # a client that gave up
                    super().handle()

        return Handler


class RawServer:
    """A server that writes bytes: `answer(path, body)` gives the pieces of what it says to a request, before it hangs up."""

    def __init__(self, answer):
        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                with contextlib.suppress(OSError):  # a client that gave up
                    path = self.rfile.readline().split()[1].decode()
                    head = {}
                    while line := self.rfile.readline().strip():
                        name, _, value = line.decode().partition(":")
                        head[name.lower()] = value.strip()
                    body = self.rfile.read(int(head.get("content-length", 0)))
                    for piece in answer(path, json.loads(body) if body else None):
                        self.wfile.write(piece)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            request_queue_size = 128

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def http_answer(content, status=200, **headers):
    """An HTTP answer as bytes; `content` is JSON or bytes, a header's name is written with `_` for `-`, None leaves it out."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    named = {"Content-Type": "application/json", "Content-Length": len(body), "Connection": "close"}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in named.items() if value is not None)]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
