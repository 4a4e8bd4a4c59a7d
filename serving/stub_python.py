"""The interpreter that runs the server's Python steps: this one, or another where this one cannot have NumPy 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vilu.errors import UserError

_QUESTION = """
import ctypes, json, os, sys, sysconfig
from importlib.metadata import version
libraries = sysconfig.get_config_var("LIBDIR") or ""
library = "libpython%d.%d.so.1.0" % sys.version_info[:2]
shared = False
for path in (os.path.join(libraries, library), library):
    try:
        ctypes.CDLL(path)
        shared = True
    except OSError:
        pass
try:
    numpy = version("numpy")
except Exception:
    numpy = ""
found = {"version": "%d.%d" % sys.version_info[:2], "libraries": libraries, "shared": shared, "numpy": numpy}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class StubPython:
    """An interpreter, with what the server must know of it.

    Attributes:
        executable: its path, within its virtual environment.
        version: "3.12" and the like; the wheel carries one stub for each.
        libraries: the folder of its libraries, "" where it names none.
        shared: whether it has a shared library, which the stub is linked with.
        numpy: the version of NumPy that it imports, "" where it has none.
    """

    executable: Path
    version: str
    libraries: str
    shared: bool
    numpy: str

    def check(self) -> None:
        """Refuse what would make a stub hang or misread its tensors.

        Raises:
            UserError: NumPy is missing or is not NumPy 1, or the interpreter has no shared library.
        """
        if self.numpy.split(".")[0] != "1":
            # The stub was built against NumPy 1. Under NumPy 2 it reads every tensor with strides of 0, and BYTES
            # inputs kill it.
            have = f"NumPy {self.numpy}" if self.numpy else "no NumPy"
            late = tuple(map(int, self.version.split("."))) >= (3, 13)
            mend = (
                "name the python of an environment of 3.10 to 3.12 that holds 'vilu[serving]' and 'numpy<2' in "
                "VILU_SERVER_PYTHON"
                if late
                else "pip install 'numpy<2' there"
            )
            raise UserError(f"the wheel's tritonserver needs NumPy 1, {self.executable} has {have}: {mend}")
        if not self.shared:
            raise UserError(
                f"{self.executable} has no libpython{self.version}.so.1.0, which the server's Python steps need "
                f"(Debian: apt-get install libpython{self.version})"
            )


def stub_python() -> StubPython:
    """The interpreter that VILU_SERVER_PYTHON names, else that of the environment `server` within this one, else this.

    Raises:
        UserError: VILU_SERVER_PYTHON names no interpreter that runs.
    """
    named = os.environ.get("VILU_SERVER_PYTHON")
    within = Path(sys.prefix) / "server" / "bin" / "python"
    return _asked(named or str(within if within.is_file() else sys.executable))


@lru_cache(maxsize=4)
def _asked(executable: str) -> StubPython:
    try:
        done = subprocess.run([executable, "-c", _QUESTION], capture_output=True, text=True, timeout=30, check=True)
        answer = json.loads(done.stdout)
        # Not resolved: a virtual environment's packages are found by where its own link lies.
        return StubPython(Path(os.path.abspath(executable)), **answer)
    except (OSError, ValueError, TypeError, subprocess.SubprocessError):
        raise UserError(f"VILU_SERVER_PYTHON: {executable}: not a Python that runs") from None
