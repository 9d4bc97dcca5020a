"""A proxy between a client and an object store, which breaks what it is told to break. By default it is on loopback.

`policy(method, path, number)` says of each request, counted from 1, what goes wrong with it: None; a `Refusal`; `reset`
(the connection is cut before the store hears of it) or `lost` (it is cut once the store has done what it was asked).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from aiohttp import ClientError, ClientSession, TCPConnector, web
from yarl import URL

_NOT_PASSED_ON = {"transfer-encoding", "connection", "expect", "content-length"}


@dataclass(frozen=True)
class Refusal:
    """An answer as S3 gives it."""

    status: int
    code: str

    @property
    def text(self) -> str:
        return f'<?xml version="1.0"?><Error><Code>{self.code}</Code><Message>injected: {self.code}</Message></Error>'


SLOW_DOWN, FULL = Refusal(503, "SlowDown"), Refusal(507, "InsufficientStorage")
EXPIRED = Refusal(400, "ExpiredToken")
Policy = Callable[[str, str, int], Refusal | Literal["reset", "lost"] | None]


class FaultProxy:
    """Serves on `port` until closed. `policy` may be replaced at any time; `broken` counts what it broke."""

    def __init__(self, target: str, host: str = "127.0.0.1") -> None:
        self.target, self.host, self.policy = target, host, _nothing
        self.requests, self.broken, self.port = 0, 0, 0
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._done = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._thread.start()
        assert self._ready.wait(20)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(10)

    def set(self, policy: Policy | None) -> None:
        """From now on this policy, counted anew."""
        self.policy, self.requests, self.broken = policy or _nothing, 0, 0

    async def _serve(self) -> None:
        async with ClientSession(connector=TCPConnector(limit=0), auto_decompress=False) as session:
            app = web.Application(client_max_size=1 << 30)

            async def answer(request: web.Request) -> web.StreamResponse:
                try:
                    return await self._answer(session, request)
                except ClientError:  # the store has not started yet
                    return web.Response(status=503)
                except ConnectionError:  # the client was killed in the middle of its request
                    return _cut(request)

            app.router.add_route("*", "/{path:.*}", answer)
            runner = web.AppRunner(app)
            await runner.setup()
            site = web.TCPSite(runner, self.host, 0)
            await site.start()
            self.port = runner.addresses[0][1]
            self._ready.set()
            await self._done.wait()
            await runner.cleanup()

    async def _answer(self, session: ClientSession, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        fault = self.policy(request.method, request.raw_path, self.requests)
        self.broken += fault is not None
        body = await request.read()
        if isinstance(fault, Refusal):
            return web.Response(status=fault.status, text=fault.text, content_type="application/xml")
        if fault == "reset":
            return _cut(request)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _NOT_PASSED_ON}
        url = URL(self.target + request.raw_path, encoded=True)
        async with session.request(
            request.method, url, headers=headers, data=body, skip_auto_headers=["User-Agent", "Content-Type"]
        ) as answer:
            content = await answer.read()
            if fault == "lost":
                return _cut(request)
            passed = {name: value for name, value in answer.headers.items() if name.lower() not in _NOT_PASSED_ON}
            if request.method == "HEAD" and "Content-Length" in answer.headers:
                passed["Content-Length"] = answer.headers["Content-Length"]
            return web.Response(status=answer.status, body=content, headers=passed)


def _cut(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _nothing(method: str, path: str, number: int) -> None:
    return None
