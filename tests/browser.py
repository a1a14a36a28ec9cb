"""Headless Chromium over its debugging pipe, for tests that look at a page as a person would. No package is needed, only a browser."""

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
COMPLAINTS = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")


def find_browser():
    """The path of a browser, None where none is installed."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


class Browser:
    """One page of one browser. `complaints` and `requests` gather what the console and the network saw since the last `open`."""

    def __enter__(self):
        self._folder = tempfile.mkdtemp()
        to_browser, our_end = os.pipe()
        from_browser, their_end = os.pipe()

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions"]
        flags += ["--remote-debugging-pipe", "--disable-background-networking", f"--user-data-dir={self._folder}"]
        # The protocol's pipe is descriptors 3 and 4 there; the shell puts ours in their place.
        hand_over = ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{their_end}', "bash", find_browser(), *flags, "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        self._process = subprocess.Popen(hand_over, pass_fds=(to_browser, their_end), **quiet)
        os.close(to_browser)
        os.close(their_end)
        self._out, self._in = os.fdopen(our_end, "wb", buffering=0), os.fdopen(from_browser, "rb", buffering=0)
        self._number, self._rest, self._session, self.events = 0, b"", None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        self._out.close()
        self._in.close()
        # The browser's own children are not ours to wait for: one that is still dying may yet write into the folder.
        deadline = time.monotonic() + 10
        while os.path.exists(self._folder) and time.monotonic() < deadline:
            shutil.rmtree(self._folder, ignore_errors=True)
            time.sleep(0.02)

    def call(self, method, **params):
        """The result of a command of the DevTools protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | ({"sessionId": self._session} if self._session else {})
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self):
        while b"\0" not in self._rest:
            piece = self._in.read(1 << 16)
            assert piece, "the browser ended"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def open(self, path, width, height=844, dark=False, seconds=20):
        """Load a file at this width in pixels, and wait until it is whole."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + seconds
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < deadline, "the page did not load"
            self.value("1")
            time.sleep(0.05)

    def value(self, expression):
        """What an expression of JavaScript gives in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self, path):
        """A PNG of the whole page."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def print_layout(self):
        """From now on the page is laid out as for a printer."""
        self.call("Emulation.setEmulatedMedia", media="print")

    def pdf(self):
        """The page as a printer gets it: a PDF of A4 pages."""
        return base64.b64decode(self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])

    @property
    def complaints(self):
        return [event for event in self.events if event.get("method") in COMPLAINTS]

    @property
    def requests(self):
        sent = [event["params"]["request"]["url"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]
