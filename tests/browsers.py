"""A headless Chromium, driven through its DevTools protocol; tests are skipped where there is none."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLACES = (os.environ.get("FINDREC_BROWSER"), *map(shutil.which, NAMES))
BROWSER = next((path for path in PLACES if path), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here: apt-get install chromium, or set FINDREC_BROWSER to its path"
)
_KEYS = {"Tab": 9, "Enter": 13, " ": 32}


class Tab:
    """One tab; `problems` are errors of its console and scripts, `asked` the addresses it requested."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count(1)
        self.problems: list[str] = []
        self.asked: list[str] = []

    async def listen(self) -> None:
        """Read messages of the browser until the connection ends."""
        async for message in self._socket:
            tree = json.loads(message.data)
            if "id" in tree:
                self._waiting.pop(tree["id"]).set_result(tree)
            elif tree["method"] in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(json.dumps(tree["params"]))
            elif tree["method"] == "Network.requestWillBeSent":
                self.asked.append(tree["params"]["request"]["url"])

    async def send(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol; returns its result."""
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        tree = await asyncio.wait_for(answer, 30)
        assert "error" not in tree, tree
        return tree["result"]

    async def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = await self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        for _ in range(600):
            if await self.value(expression):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"never true: {expression}; page: {await self.value('document.body.innerText')}")

    async def press(self, key: str) -> None:
        """Press and release a key."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        code = _KEYS[key]
        for kind in ("keyDown", "keyUp"):
            keys = {"key": key, "windowsVirtualKeyCode": code} | ({"text": text} if kind == "keyDown" else {})
            await self.send("Input.dispatchKeyEvent", type=kind, **keys)

    async def tab_to(self, condition: str) -> None:
        """Press Tab until a JavaScript condition on the focused element `it` holds."""
        for _ in range(40):
            if await self.value(f"((it) => {condition})(document.activeElement)"):
                return
            await self.press("Tab")
        raise AssertionError(f"not reachable by Tab: {condition}")

    async def type(self, text: str) -> None:
        """Type a text into the focused element."""
        await self.send("Input.insertText", text=text)


@asynccontextmanager
async def opened(address: str, scratch: Path, *, width: int = 1200) -> AsyncIterator[Tab]:
    """Open a page, `width` pixels wide; only addresses of this machine are resolved."""
    assert BROWSER is not None
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-port=0"]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={scratch / 'profile'}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        note = scratch / "profile" / "DevToolsActivePort"
        async with asyncio.timeout(60):
            while not (note.is_file() and note.read_text().count("\n")):
                await asyncio.sleep(0.05)
        port = note.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
                place = (await answer.json())["webSocketDebuggerUrl"]
            async with session.ws_connect(place, max_msg_size=0) as socket:
                tab = Tab(socket)
                listening = asyncio.create_task(tab.listen())
                for domain in ("Runtime", "Log", "Network", "Page"):
                    await tab.send(f"{domain}.enable")
                size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
                await tab.send("Emulation.setDeviceMetricsOverride", **size)
                await tab.send("Page.navigate", url=address)
                yield tab
                listening.cancel()
    finally:
        process.kill()
        process.wait()
