"""Headless Chromium over its DevTools protocol, on two pipes: no driver and no package beside the browser itself.

`python -m tests.serving.browser IMAGE PICTURE` asks the page about an image and draws the page: docs/web.png shows the
demo's demo/images/shapes-0007-crimson-hexagon.jpg, in front of a `vilu serve`.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 30  # for anything to come about
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str | None:
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def web(server, *options, **process_options):
    """`vilu web` before a running server, as its own process: gives (process, URL)."""
    command = [sys.executable, "-m", "vilu", "web", "--url", server, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **process_options)
    try:
        url = process.stderr.readline().strip()
        assert url.startswith("http://"), url + process.stderr.read()
        yield process, url
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)


class Browser:
    """One page of a browser of its own, as a context manager.

    Attributes:
        requests: every URL that the page has asked for.
        complaints: what went wrong in it: errors of the console, of scripts, of its Content-Security-Policy.
    """

    def __init__(self, path: str | None, width: int = 1200, height: int = 800, dark: bool = False) -> None:
        if path is None:
            raise FileNotFoundError("no Chromium")
        self.path, self.size, self.dark = path, (width, height), dark
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def __enter__(self) -> "Browser":
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # No sandbox: it wants namespaces that containers lack, and only our own page is shown.
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        flags += ["--no-first-run", "--disable-background-networking"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={self.profile.name}", "about:blank"]
        its_in, self.out = os.pipe()
        self.inward, its_out = os.pipe()
        # The browser reads its descriptor 3 and writes 4.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (its_in, its_out)]
        actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_DUP2, ends[0], 3), (os.POSIX_SPAWN_DUP2, ends[1], 4)]
        actions += [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
        self.process = os.posix_spawn(self.path, [self.path, *flags], os.environ, file_actions=actions, setpgroup=0)
        for end in (its_in, its_out, *ends):
            os.close(end)
        self.buffer, self.count, self.session = b"", 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network", "DOM", "Accessibility"):
            self.call(f"{domain}.enable")
        width, height = self.size
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self.dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        return self

    def __exit__(self, *_) -> None:
        os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.out)
        os.close(self.inward)
        self.profile.cleanup()

    def call(self, method: str, **parameters):
        """One command of the protocol; events that come meanwhile are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters, **self.session}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.out, data) :]
        end = time.monotonic() + SECONDS
        while True:
            told = self._read(end)
            if told.get("id") == self.count:
                assert "error" not in told, f"{method}: {told['error']}"
                return told["result"]
            self._event(told.get("method"), told.get("params", {}))

    def _read(self, end: float) -> dict:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.inward], [], [], max(0, end - time.monotonic()))
            data = os.read(self.inward, 1 << 20) if ready else b""
            assert data, "the browser ended" if ready else f"the browser gave no answer in {SECONDS} s"
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def _event(self, name: str | None, told: dict) -> None:
        if name == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif name == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.complaints.append(told["entry"]["text"])
        elif name == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(told["exceptionDetails"]))
        elif name == "Runtime.consoleAPICalled" and told["type"] == "error":
            self.complaints.append(json.dumps(told["args"]))

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str):
        """The value of a JavaScript expression."""
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait(self, condition: str):
        """Until a JavaScript expression is true; its value."""
        end = time.monotonic() + SECONDS
        while not (value := self.run(condition)):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.02)
        return value

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def press(self, key: str) -> None:
        """A key, as from a keyboard: "Tab", "Enter", "End"..."""
        code = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowDown": 40}[key]
        text = {"Enter": "\r"}.get(key)
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", key=key, code=key, windowsVirtualKeyCode=code, **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, path: Path) -> None:
        """The whole page, as long as it is, as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


def main(image: Path, picture: Path, server: str = "127.0.0.1:8001") -> None:
    with web(server) as (_, url), Browser(find_chromium()) as browser:
        browser.go(url)
        browser.wait("served !== null")
        browser.choose_file("#file", image.resolve())
        browser.wait("answer !== null && preview.complete && !document.getAnimations().length")
        browser.screenshot(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
