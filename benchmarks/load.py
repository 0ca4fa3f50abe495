"""Load over HTTP, with every answer compared with the right one.

Open loop: requests come at Poisson times, whatever becomes of the earlier ones, and each is timed from when it was due.
Closed loop: so many clients each wait for their answer before they ask again.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import aiohttp

UNANSWERED = 0  # in place of a status


@dataclass(frozen=True)
class Ask:
    """One request. inputs: how many sentences it holds. is_right: whether a body of status 200 is the right answer."""

    path: str
    body: bytes
    is_right: Callable[[bytes], bool]
    inputs: int = 1


@dataclass(frozen=True)
class Outcome:
    """What became of a request that was due `due_s` after the beginning; both times are from then."""

    due_s: float
    first_byte_s: float
    seconds: float
    status: int
    is_right: bool
    inputs: int
    told: str = ""  # of an answer that is not right


class Load:
    """A client of one service. timeout_s: what each request says that it can wait, where it says so."""

    def __init__(self, address: str, timeout_s: float | None = None) -> None:
        self.address = address
        self.headers = {"content-type": "application/json"}
        if timeout_s is not None:
            self.headers["x-request-timeout-seconds"] = str(timeout_s)

    def open_loop(self, asks: Sequence[Ask], rate: float, seconds: float, seed: int = 0) -> list[Outcome]:
        """As many requests as come within `seconds` at `rate` a second, and as long as their answers take."""
        return asyncio.run(self._open_loop(asks, list(_arrivals(rate, seconds, seed))))

    def closed_loop(self, asks: Sequence[Ask], clients: int, seconds: float) -> list[Outcome]:
        return asyncio.run(self._closed_loop(asks, clients, seconds))

    async def _open_loop(self, asks: Sequence[Ask], arrivals: Sequence[float]) -> list[Outcome]:
        async with self._session() as session:
            began = time.monotonic()
            tasks = []
            for due, ask in zip(arrivals, cycle(asks), strict=False):
                await asyncio.sleep(began + due - time.monotonic())
                tasks.append(asyncio.create_task(self._ask(session, ask, began, due)))
            return list(await asyncio.gather(*tasks))

    async def _closed_loop(self, asks: Sequence[Ask], clients: int, seconds: float) -> list[Outcome]:
        began = time.monotonic()
        outcomes: list[Outcome] = []

        async def client(number: int) -> None:
            own = cycle(islice(cycle(asks), number, number + len(asks)))
            while (now := time.monotonic() - began) < seconds:
                outcomes.append(await self._ask(session, next(own), began, now))

        async with self._session() as session:
            await asyncio.gather(*(client(number) for number in range(clients)))
        return outcomes

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            self.address,
            headers=self.headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=120),
        )

    async def _ask(self, session: aiohttp.ClientSession, ask: Ask, began: float, due: float) -> Outcome:
        status, body, first_byte = UNANSWERED, b"", 0.0
        try:
            async with session.post(ask.path, data=ask.body) as response:
                body = await response.content.readany()
                first_byte = time.monotonic() - began
                body += await response.read()
                status = response.status
        except (aiohttp.ClientError, TimeoutError) as error:
            body = repr(error).encode()
        ended = time.monotonic() - began
        is_right = status == 200 and ask.is_right(body)
        told = "" if is_right else body[:300].decode(errors="replace")
        return Outcome(due, (first_byte or ended) - due, ended - due, status, is_right, ask.inputs, told)


def _arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    drawn = random.Random(seed)
    now = drawn.expovariate(rate)
    while now < seconds:
        yield now
        now += drawn.expovariate(rate)
