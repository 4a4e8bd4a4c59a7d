"""Large requests through system shared memory: the client writes images there, the server on this machine reads them.

Every region is unlinked when it is given up, whatever the server then does. A failure (a full /dev/shm, a server in
another container, a front that does not offer it) is logged and costs a pause, after which it is tried again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing.shared_memory import SharedMemory

logger = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0  # seconds without shared memory after a failure, doubling


class Region:
    """A piece of system shared memory that holds the images of one request at a time.

    Raises:
        OSError: /dev/shm has not `size` bytes.
    """

    def __init__(self, size: int) -> None:
        self.memory = SharedMemory(f"vilu_client_{os.getpid()}_{uuid.uuid4().hex[:12]}", create=True, size=size)
        self.name, self.size = self.memory.name, self.memory.size
        try:
            with open(f"/dev/shm/{self.name}", "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # else writing to a full /dev/shm would be a SIGBUS
        except OSError:
            self.close()
            raise

    def fill(self, batch: Sequence[bytes]) -> None:
        """Write Triton's layout of BYTES: every string after its length, 4 bytes little endian."""
        at, memory = 0, self.memory.buf
        assert memory is not None  # until it is closed
        for data in batch:
            memory[at : at + 4] = len(data).to_bytes(4, "little")
            memory[at + 4 : at + 4 + len(data)] = data
            at += 4 + len(data)

    def close(self) -> None:
        self.memory.close()
        with contextlib.suppress(FileNotFoundError):  # already gone is what is wanted
            self.memory.unlink()


class RegionPool:
    """The regions of one client. A region is in the hands of one request, free, or given up.

    Args:
        register: makes the server map a region.
        unregister: makes the server forget a region's name.
        errors: what these two raise where the server refuses or is away; other exceptions are the program's faults.
        level: of the log line for a failure.
    """

    def __init__(
        self,
        register: Callable[[Region], Awaitable[None]],
        unregister: Callable[[str], Awaitable[None]],
        errors: tuple[type[Exception], ...],
        level: int,
    ) -> None:
        self.register, self.unregister, self.errors, self.level = register, unregister, errors, level
        self.free: list[Region] = []
        self.given_up: list[str] = []  # names that the server may still hold
        self.again_at, self.pause = 0.0, FIRST_PAUSE

    async def take(self, size: int) -> Region | None:
        """A region of at least `size` bytes that the server has mapped; None where there is none to be had now."""
        await self._forget()
        while self.free:
            region = self.free.pop()
            if region.size >= size:
                return region
            self.give_up(region)
        if time.monotonic() < self.again_at:
            return None
        try:
            region = Region(1 << (size - 1).bit_length())
        except OSError as error:
            self._failed(error)
            return None
        try:
            await self.register(region)
        except BaseException as error:
            self.give_up(region)  # cancelled, too: the server may have mapped it, nobody may keep it
            if not isinstance(error, self.errors):
                raise
            self._failed(error)
            return None
        self.pause = FIRST_PAUSE
        return region

    def give_back(self, region: Region) -> None:
        """The server has answered: another request may write there."""
        self.free.append(region)

    def give_up(self, region: Region) -> None:
        """The server may still read it: nothing else may be written there."""
        region.close()
        self.given_up.append(region.name)

    async def close(self) -> None:
        """Unlink every free region, then make the server forget the names."""
        while self.free:
            self.give_up(self.free.pop())
        await self._forget()

    async def _forget(self) -> None:
        while self.given_up:
            with contextlib.suppress(*self.errors):  # the server may be gone
                await self.unregister(self.given_up.pop())

    def _failed(self, error: BaseException) -> None:
        logger.log(self.level, "requests go without shared memory for %g s: %s", self.pause, error)
        self.again_at = time.monotonic() + self.pause
        self.pause = min(2 * self.pause, LONGEST_PAUSE)
