"""Nothing leaves the device: no socket is ever made, and ONNX Runtime's telemetry stays off.

A seccomp filter ends the process at the first system call that could reach a network, so a passing
run made none.
"""

from __future__ import annotations

import platform
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.sdk.conftest import run_python

# socket, connect, socketpair and io_uring_setup, which can make sockets as well. Source:
# <asm/unistd.h>.
CALLS = {"x86_64": (41, 42, 53, 425), "aarch64": (198, 203, 199, 425)}

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in CALLS, reason="needs Linux's seccomp"
)

SEAL = """
import ctypes, struct, sys
def seal(numbers):
    # BPF: load the number of the system call, end the process on one of ours, allow the rest. Source: <linux/filter.h>.
    rows = [(0x20, 0, 0, 0)]
    for left, number in zip(range(len(numbers), 0, -1), numbers):
        rows.append((0x15, left, 0, number))
    rows += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x80000000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in rows))
    program = struct.pack("HxxxxxxP", len(rows), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0                  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
seal([int(number) for number in sys.argv[1].split(",")])
"""
USE = """
from egemma import Embedder
with Embedder.open(sys.argv[2], threads=2) as embedder:
    embedder.embed_query("where is the pump")
    embedder.embed_documents(["a", "b"], titles=["t", None])
print("done")
"""


# ONNX Runtime keeps silent by itself where it takes the machine for a build server; a user's has
# none of these.
BUILD_SERVER = dict.fromkeys(
    (
        "CI",
        "GITHUB_ACTIONS",
        "GITLAB_CI",
        "TF_BUILD",
        "JENKINS_URL",
        "TEAMCITY_VERSION",
        "BUILD_ID",
        "TRAVIS",
    )
)


def sealed(script: str, bundle: Path, cache: Path, **environment: str | None):  # type: ignore[no-untyped-def]
    numbers = ",".join(map(str, CALLS[platform.machine()]))
    return run_python(
        SEAL + script,
        numbers,
        bundle,
        XDG_CACHE_HOME=str(cache),
        HOME=str(cache),
        ORT_DISABLE_TELEMETRY=None,
        **BUILD_SERVER,
        **environment,
    )


@pytest.mark.parametrize("kind", ["onnx_bundle", "pte_bundle"])
def test_embedding_makes_no_socket_and_writes_nothing(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    done = sealed(USE, request.getfixturevalue(kind), tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    "call", ["socket.socket()", "socket.socket(socket.AF_UNIX)", "socket.socketpair()"]
)
def test_the_seal_ends_a_process_that_makes_a_socket(call: str, tmp_path: Path) -> None:
    assert sealed(f"import socket; {call}", tmp_path, tmp_path).returncode == -signal.SIGSYS


def test_onnx_runtime_alone_would_report(onnx_bundle: Path, tmp_path: Path) -> None:
    """Without our switch it does what the tests above look for; where it does not, they prove
    nothing.
    """
    if tuple(map(int, version("onnxruntime").split(".")[:2])) < (1, 32):
        pytest.skip("has no telemetry on Linux")
    done = sealed(
        "import onnxruntime; onnxruntime.InferenceSession(sys.argv[2] + '/model.onnx')",
        onnx_bundle,
        tmp_path,
    )
    assert done.returncode == -signal.SIGSYS or list(tmp_path.rglob("*")) != []


def test_an_application_that_started_onnx_runtime_itself_is_told(
    onnx_bundle: Path, tmp_path: Path
) -> None:
    late = run_python(
        "import sys, onnxruntime\nsys.argv.insert(1, '')" + USE,
        onnx_bundle,
        XDG_CACHE_HOME=str(tmp_path),
        ORT_DISABLE_TELEMETRY=None,
    )
    assert late.stdout.strip() == "done", late.stderr
    assert "RuntimeWarning: onnxruntime was imported before egemma" in late.stderr
    early = run_python(
        "import sys, onnxruntime\nsys.argv.insert(1, '')" + USE,
        onnx_bundle,
        XDG_CACHE_HOME=str(tmp_path),
        ORT_DISABLE_TELEMETRY="1",
    )
    assert (early.stdout.strip(), early.stderr) == ("done", "")
