"""The front door: one process before tritonserver, which only whole, welcome and well-paced questions pass.

A question's way: `grpc_side` or `http_side` (with `rest`) takes it, `keys` knows its sender, `core` admits or refuses
it by `limits`, `check` holds it against the model's configuration, `upstream` has it answered; `observe` counts it.
"""

from vilu.serving.door.limits import Limits
from vilu.serving.door.run import Door, Options, Ports, own_server, run

__all__ = ["Door", "Limits", "Options", "Ports", "own_server", "run"]
