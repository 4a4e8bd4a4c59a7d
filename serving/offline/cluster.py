"""Ray: joined where it runs, else started here for one job; quiet, on loopback, and without usage statistics."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from vilu.data.tables import first_line
from vilu.errors import UserError

REACH_SECONDS = 10
# Ray reads these when it is imported, so they stand before the first import.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray would report to its makers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # as later versions of Ray do; silences a warning
    "RAY_DATA_LOG_LEVEL": "ERROR",
}
# Ray replaces a loopback address by the machine's own, unless it may make no clusters.
_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@contextlib.contextmanager
def cluster(
    address: str | None = None,
    *,
    cpus: int | None = None,
    gpus: int | None = None,
    object_store_bytes: int | None = None,
    progress: bool = False,
) -> Iterator[Any]:
    """Yield Ray, connected. A Ray that was connected before stays so afterwards.

    Args:
        address: "auto" for the cluster of this machine or $RAY_ADDRESS, or HOST:PORT; None starts a Ray that only this
            machine can reach, and ends it with the block.
        cpus, gpus, object_store_bytes: what a Ray that starts here may use; None is what Ray finds.
        progress: whether Ray draws its progress bars.

    Raises:
        UserError: no cluster answers at the address, or Ray does not start.
    """
    for name, value in {**_ENVIRONMENT, **(_ALONE if address is None else {})}.items():
        os.environ.setdefault(name, value)
    import ray
    from ray.data import DataContext

    started = not ray.is_initialized()
    if started:
        _check_reachable(address)
        here: dict[str, Any] = {"address": address}
        if address is None:
            here = {"address": "local", "num_cpus": cpus, "num_gpus": gpus, "include_dashboard": False}
            here |= {"_node_ip_address": "127.0.0.1", "object_store_memory": object_store_bytes}
        try:
            ray.init(**here, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray has no common type for a start that fails
            place = f"no Ray cluster answers at {address}" if address else "Ray does not start here"
            raise UserError(f"{place} ({first_line(error)})") from None
    context = DataContext.get_current()
    before = context.enable_progress_bars, context.print_on_execution_start
    context.enable_progress_bars, context.print_on_execution_start = progress, False
    try:
        yield ray
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before
        if started:
            ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Raise UserError where nothing listens at HOST:PORT. Ray itself would try for minutes."""
    place = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address or ""
    if found := re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d{1,5})", place):
        try:
            socket.create_connection((found[1], int(found[2])), REACH_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"no Ray cluster answers at {place} ({first_line(error)})") from None


@contextlib.contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """Keep what Ray and its processes print from stdout and stderr; an error of this program shows it after all.

    Ray's C++ side writes to the files themselves, past Python's logging, and has no setting for that.
    """
    if not wanted:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    own = [(handle, os.dup(handle)) for handle in (1, 2)]
    shown = True
    with tempfile.TemporaryFile() as kept:
        for handle, _ in own:
            os.dup2(kept.fileno(), handle)
        try:
            yield
            shown = False
        except (UserError, KeyboardInterrupt, SystemExit):  # Ray turns SIGTERM into SystemExit
            shown = False
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for handle, before in own:
                os.dup2(before, handle)
                os.close(before)
            if shown:
                kept.seek(0)
                sys.stderr.write(kept.read().decode(errors="replace"))


def reason(error: BaseException) -> UserError | None:
    """Return in one line what ended a job: the UserError that it began with, or a failure of a disk, store or node.

    None stands for an error of this program, whose traceback is worth reading.
    """
    import pyarrow as pa
    from ray.exceptions import RayError, RayTaskError

    causes: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is not None and all(one is not other for other in causes):
            causes.append(one)
            pending += [one.__context__, one.__cause__, getattr(one, "cause", None)]
    for one in causes:
        if type(one) is UserError:  # Ray's own wrapper is a subclass
            return one
    # Ray passes some causes on as text alone.
    told = [re.findall(r"^(?:\S+\.)?(UserError|OSError|\w+IOError): (.+)$", str(one), re.MULTILINE) for one in causes]
    for kind, text in [found[-1] for found in told if found]:
        return UserError(text if kind == "UserError" else f"the job ended: {text}")
    for one in reversed(causes):
        failed = isinstance(one, OSError | pa.ArrowException) and not isinstance(one, RayError)
        if failed or (isinstance(one, RayError) and not isinstance(one, RayTaskError)):
            return UserError(f"the job ended: {first_line(one)}")
    return None
