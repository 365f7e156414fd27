"""A real browser for the tests that look at a page.

Needs Debian's packages chromium and chromium-driver; `make browser` installs them where there is apt and root.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1500,1000"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
# TensorBoard's pages are web components: text and images hide in shadow roots
WALK = """
function walk(node, out) {
  if (node.nodeType === 3) { out.text.push(node.textContent); }
  if (node.tagName === 'IMG') { out.images.push(node); }
  if (node.shadowRoot) { walk(node.shadowRoot, out); }
  for (const child of node.childNodes) {
    if (!['SCRIPT', 'STYLE'].includes(child.tagName)) { walk(child, out); }
  }
  return out;
}
const page = walk(document.body, {text: [], images: []});
const text = page.text.join(' ');
"""
TEXT = WALK + "return text;"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def wait_until_up(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert process.poll() is None, "the server stopped"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} did not come up")


class Browser:
    """Chromium through the WebDriver protocol: no client library is needed for a few pages."""

    def __init__(self, base: str, profile: Path) -> None:
        options = {"args": [*ARGUMENTS, f"--user-data-dir={profile}"], "binary": CHROMIUM}
        logs = {"goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options, **logs}}}
        self.url = f"{base}/session/{call(f'{base}/session', wanted)['value']['sessionId']}"

    def open(self, url: str) -> None:
        call(f"{self.url}/url", {"url": url})

    def run(self, script: str) -> Any:
        return call(f"{self.url}/execute/sync", {"script": script, "args": []})["value"]

    def wait(self, script: str, seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}\n{self.run(TEXT)[:2000]}"
            time.sleep(0.3)
        return value

    def devtools(self, command: str, **params: Any) -> None:
        """One of Chromium's own commands, such as Emulation.setDeviceMetricsOverride."""
        call(f"{self.url}/goog/cdp/execute", {"cmd": command, "params": params})

    def look_as(self, width: int, scheme: str = "light") -> None:
        """Show pages at a width in CSS pixels, in a colour scheme."""
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def press(self, key: str) -> None:
        keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        call(f"{self.url}/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": keys}]})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What the browser noted since it was asked last: "browser" (its console) or "performance" (what it loaded)."""
        found: list[dict[str, Any]] = call(f"{self.url}/se/log", {"type": kind})["value"]
        return found

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(call(f"{self.url}/screenshot")["value"]))

    def close(self) -> None:
        request = urllib.request.Request(self.url, method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()


@contextmanager
def opened_browser(tmp_path: Path) -> Iterator[Browser]:
    """A browser for one test, which is skipped where there is none, outside of CI."""
    if CHROMIUM is None or DRIVER is None:
        assert not os.environ.get("CI"), "in CI the browser test is not skipped: .ci/run installs chromium"
        pytest.skip("chromium and chromedriver are not installed: `make browser` (Debian, as root) installs them")
    port = free_port()
    log = (tmp_path / "driver.log").open("wb")
    process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=log, stderr=log)
    try:
        wait_until_up(f"http://127.0.0.1:{port}/status", process)
        session = Browser(f"http://127.0.0.1:{port}", tmp_path / "profile")
        yield session
        session.close()
    finally:
        process.terminate()
        process.wait(timeout=30)
        log.close()
