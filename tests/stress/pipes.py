"""Messages of a child process to the one that may kill it."""

from __future__ import annotations

import os
import pickle
import select
import time
from collections.abc import Callable
from typing import Any


def send_message(pipe: int, what: Any) -> None:
    packed = pickle.dumps(what)
    data = len(packed).to_bytes(4, "little") + packed
    while data:
        data = data[os.write(pipe, data) :]


class Receiver:
    """Reads what a child tells, until it is dead."""

    def __init__(self, pipe: int) -> None:
        self._pipe, self._data, self._closed = pipe, b"", False

    def next(self, timeout_s: float | None) -> Any:
        """The next message; None after the timeout, or at the end."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if len(self._data) >= 4 and len(self._data) >= 4 + (
                size := int.from_bytes(self._data[:4], "little")
            ):
                message, self._data = pickle.loads(self._data[4 : 4 + size]), self._data[4 + size :]
                return message
            if self._closed:
                return None
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._pipe], [], [], left)[0]:
                return None
            data = os.read(self._pipe, 65536)
            self._closed = not data
            self._data += data


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Damage may crash a process; this one has to go on."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            send_message(send, work())
            os._exit(0)
        except BaseException as error:
            send_message(send, {"problem": f"{type(error).__name__}: {error}"})
            os._exit(1)
    os.close(send)
    result = Receiver(receive).next(None)
    os.close(receive)
    _, status = os.waitpid(pid, 0)
    return result if result is not None else {"problem": f"the process died with status {status}"}
