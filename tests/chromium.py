"""A headless Chromium, driven over its DevTools protocol by websockets (which vLLM brings): no other browser tool is needed."""

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path

#: What keeps it from asking for anything: the page has to work offline.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip


def find():
    """The path of a Chromium, or None."""
    return next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


class Chromium:
    """One browser with one page: `with Chromium(tmp_path) as page: page.open(file)`."""

    def __init__(self, profile):
        self._profile = Path(profile)
        self.requests, self.problems = [], []
        self._number = 0

    def __enter__(self):
        from websockets.sync.client import connect

        self._process = subprocess.Popen(
            [find(), *FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            lines = self._wait_for(self._profile / "DevToolsActivePort")
            self._socket = connect(f"ws://127.0.0.1:{lines[0]}{lines[1]}", max_size=None, proxy=None)
            target = self.send("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.send(f"{domain}.enable")
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, *error):
        self._socket.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait_for(self, file):
        for _ in range(300):
            if file.is_file() and len(lines := file.read_text().split()) == 2:
                return lines
            assert self._process.poll() is None, f"Chromium ended with status {self._process.returncode}"
            time.sleep(0.1)
        raise AssertionError("Chromium did not open its port in 30 s")

    def send(self, method, **params):
        """Call a method of the protocol and give its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        return self._receive(lambda answer: answer.get("id") == self._number)["result"]

    def _receive(self, wanted):
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            self._watch(answer)
            assert "error" not in answer, answer
            if wanted(answer):
                return answer

    def _watch(self, answer):
        """Remember what the page asked the network for, and what went wrong in it."""
        params = answer.get("params", {})
        if answer.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif answer.get("method") == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"].get("exception", {}).get("description", str(params)))
        elif answer.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])

    def open(self, file, address=""):
        """Open a local file; gives the seconds until it had loaded and been laid out."""
        self.send("Page.navigate", url="about:blank")
        began = time.perf_counter()
        self.send("Page.navigate", url=Path(file).resolve().as_uri() + address)
        self._receive(lambda answer: answer.get("method") == "Page.loadEventFired")
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
        return time.perf_counter() - began

    def run(self, script):
        """The value of a JavaScript expression, awaited; an exception in it is an AssertionError."""
        told = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def key(self, name, text=None):
        """Press a key."""
        self.send("Input.dispatchKeyEvent", type="keyDown", key=name, code=name, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", key=name, code=name)

    def hover(self, selector):
        """Move the mouse onto the first element that fits."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{place}.scrollIntoView({{block: 'center'}})")
        box = self.run(f"(({{x, y, width, height}}) => [x, y, width, height])({place}.getClientRects()[0])")
        x, y, width, height = box
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x + width / 2, y=y + height / 2)

    def look(self, *, width=1200, height=1000, dark=False):
        """The size of the window, and light or dark."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path=None):
        """A PNG of the window, written to `path` where there is one."""
        data = base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        if path is not None:
            Path(path).write_bytes(data)
        return data
