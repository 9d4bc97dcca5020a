"""A headless Chromium, driven by its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START_S = 90
LOAD_S = 90


def chromium() -> str | None:
    """The path of a Chromium, from CHROMIUM or by name; None if there is none."""
    given = os.environ.get("CHROMIUM")
    return given or next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def running(program: str, profile: Path) -> Iterator[int]:
    """Starts it with a profile of its own; the port of its DevTools."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command = [program, *flags, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            told, deadline = profile / "DevToolsActivePort", time.monotonic() + START_S
            while not told.is_file() or "\n" not in told.read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{program} did not start: exit status {process.poll()}")
                time.sleep(0.1)
            yield int(told.read_text().splitlines()[0])
        finally:
            process.terminate()
            process.wait(timeout=30)


@dataclass(frozen=True)
class Seen:
    """A page as it was shown. `asked` is the value of the script that was asked for."""

    screenshot: bytes
    complaints: list[str]
    requests: list[str]
    asked: Any


def look(
    port: int, url: str, script: str, *, width: int, dark: bool = False, scripts: bool = True, media: str = ""
) -> Seen:
    """Shows the page at a width, light or dark, with or without JavaScript, and evaluates a script's expression.
    `media` is 'print' for a page as it is printed.
    """
    return asyncio.run(_look(port, url, script, width, dark, scripts, media))


async def _look(port: int, url: str, script: str, width: int, dark: bool, scripts: bool, media: str) -> Seen:
    async with aiohttp.ClientSession() as session:
        async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
            address = (await answer.json())["webSocketDebuggerUrl"]
        async with session.ws_connect(address, max_msg_size=0) as socket:
            page = _Page(socket)
            for domain in ("Page", "Runtime", "Log", "Network"):
                await page.call(f"{domain}.enable")
            metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            await page.call("Emulation.setDeviceMetricsOverride", **metrics)
            features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            await page.call("Emulation.setEmulatedMedia", media=media, features=features)
            await page.call("Emulation.setScriptExecutionDisabled", value=not scripts)
            await page.call("Page.navigate", url=url)
            await page.until("Page.loadEventFired")
            answer = await page.call("Runtime.evaluate", expression=script, returnByValue=True)
            shot = await page.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
            asked = answer["result"].get("value", answer.get("exceptionDetails"))
            return Seen(base64.b64decode(shot["data"]), page.complaints(), page.requests(), asked)


class _Page:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number, self._events = socket, 0, []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=LOAD_S)
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._events.append(message)

    async def until(self, method: str) -> None:
        while not any(event.get("method") == method for event in self._events):
            self._events.append(await self._socket.receive_json(timeout=LOAD_S))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and exceptions."""
        found = []
        for event in self._events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            if event.get("method") == "Runtime.consoleAPICalled":
                found.append(str(params["args"]))
            if event.get("method") == "Log.entryAdded":
                found.append(str(params["entry"]["text"]))
        return found

    def requests(self) -> list[str]:
        """What was fetched, but for what the page itself holds."""
        sent = [event for event in self._events if event.get("method") == "Network.requestWillBeSent"]
        urls = [event["params"]["request"]["url"] for event in sent]
        return [url for url in urls if not url.startswith("data:")]
