"""Builds sdk/egemma/_native/: a small C library that runs .pte files, beside the ExecuTorch
libraries that it needs.

Everything else about the package is in pyproject.toml.
docs/decisions/0004-executorch-without-torch.md says why it is built here.

    EGEMMA_BUILD_EXECUTORCH=0    leave it out: the package then opens ONNX bundles only
    CXX                          the compiler, c++ unless set
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

EXECUTORCH = "1.5.1"  # the first release whose wheel holds a C++ SDK that does not need torch
# SHA-256 of that release's cp311 wheels for Linux x86-64, Linux aarch64 and macOS arm64, as on
# PyPI.
HASHES = (
    "274c28c2fe2b76acb03f9fa381537425c40e0098dcf886baf6d97a1a55ffe300",
    "8ee02348a3ea80ddf770822911ebf78da616b73afce0fbaaa79f23311c88c66a",
    "e747dacb39950a2d234e08f230c1e5540f7b297fd32bc8c8f4296a953bb40dc0",
)
PARTS = ("", "_threadpool", "_kernels_optimized", "_kernels_quantized", "_backend_xnnpack")
SOURCE = Path("sdk/egemma/_native")
PACKAGE_PATH = Path("egemma/_native")
OPT_OUT = (
    "Set EGEMMA_BUILD_EXECUTORCH=0 to build without ExecuTorch: the package then opens ONNX "
    "bundles only."
)
# The wheels differ by Python, the libraries in them do not: one version serves every Python that
# builds.
WHEEL_PYTHON = ("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311")


def native_suffix() -> str:
    suffix = {"linux": ".so", "darwin": ".dylib"}.get(sys.platform)
    if suffix is None:
        raise SystemExit(
            f"egemma: ExecuTorch's wheel has no C++ libraries for {sys.platform!r}. {OPT_OUT}"
        )
    return suffix


def library_names() -> list[str]:
    return [f"libexecutorch{part}{native_suffix()}" for part in PARTS]


def build_native(target: Path) -> None:
    """Fill `target` with libegx and the ExecuTorch libraries."""
    compiler = find_compiler()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="egemma-build-") as scratch:
        include = unpack(
            executorch_wheel(Path(scratch)), headers=Path(scratch) / "include", libraries=target
        )
        compile_shim(compiler, include, target)


def find_compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(command[0]) is None:
        raise SystemExit(
            f"egemma: no C++ compiler: {command[0]!r} was not found. Install g++ or clang++, or "
            f"set CXX. {OPT_OUT}"
        )
    return command


def executorch_wheel(scratch: Path) -> Path:
    """The wheel from the cache, or downloaded with the user's own pip settings."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "egemma" / "wheels"
    pinned = scratch / "requirements.txt"
    pinned.write_text(
        " ".join([f"executorch=={EXECUTORCH}", *(f"--hash=sha256:{digest}" for digest in HASHES)])
    )
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
        *WHEEL_PYTHON,
        "--dest",
        str(scratch),
        "--requirement",
        str(pinned),
    ]
    offline = [*download, "--no-index", "--find-links", str(cache)]
    # a copy in the cache needs no network; the hashes hold for it as well
    for attempt in (offline, download):
        done = subprocess.run(attempt, check=False, capture_output=True, text=True)
        wheels = sorted(scratch.glob("executorch-*.whl"))
        if done.returncode == 0 and wheels:
            if attempt is download:
                keep(wheels[0], cache)
            return wheels[0]
    raise SystemExit(
        f"egemma: pip could not fetch executorch=={EXECUTORCH}:\n{done.stderr.strip()}\n"
        f"Its wheel may also be put into {cache}. {OPT_OUT}"
    )


def keep(wheel: Path, cache: Path) -> None:
    """Copy into the cache; a read-only home is no reason to fail."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = cache / f".{wheel.name}.{os.getpid()}"
        shutil.copyfile(wheel, scratch)
        os.replace(scratch, cache / wheel.name)
    except OSError as error:
        print(f"egemma: {wheel.name} is not kept for the next build: {error}", file=sys.stderr)


def unpack(wheel: Path, *, headers: Path, libraries: Path) -> Path:
    """Take the C++ headers and the libraries out of the wheel; returns the folder for -isystem."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for library in library_names():
            member = f"executorch/lib/{library}"
            if member not in names:
                raise SystemExit(f"egemma: {wheel.name} has no {member}. {OPT_OUT}")
            (libraries / library).write_bytes(archive.read(member))
            (libraries / library).chmod(0o755)
        archive.extractall(
            headers, [name for name in names if name.startswith("executorch/include/")]
        )
    return headers / "executorch" / "include"


def compile_shim(compiler: list[str], include: Path, target: Path) -> None:
    command = [
        *compiler,
        "-O2",
        "-std=c++17",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        # The same definitions that the libraries were built with: they change the layout of
        # classes.
        "-DC10_USING_CUSTOM_GENERATED_MACROS",
        "-DET_EVENT_TRACER_ENABLED",
        "-DET_USE_THREADPOOL",
        f'-DEGX_EXECUTORCH_VERSION="{EXECUTORCH}"',
        "-isystem",
        str(include),
        "-isystem",
        str(include / "executorch/runtime/core/portable_type/c10"),
        str(SOURCE / "egx.cpp"),
        "-o",
        str(target / f"libegx{native_suffix()}"),
        f"-L{target}",
        # Kernels and delegates register themselves when they are loaded; nothing refers to them by
        # name.
        *(
            ["-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN"]
            if sys.platform == "linux"
            else ["-Wl,-rpath,@loader_path"]
        ),
        *[f"-lexecutorch{part}" for part in PARTS],
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(
            f"egemma: {shlex.join(command)}\n{done.stderr.strip()}\negemma: the C++ compiler "
            f"failed. {OPT_OUT}"
        )


class BuildNative(Command):
    """What setuptools calls build_ext: into build/lib, or with --inplace (and for editable
    installs) beside the sources.
    """

    description = "build the ExecuTorch shim"
    user_options = [  # noqa: RUF012
        ("build-lib=", "b", "folder of the built package"),
        ("inplace", "i", "build beside the sources"),
    ]
    boolean_options = ["inplace"]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.inplace = False
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def _target(self) -> Path:
        assert self.build_lib is not None
        return SOURCE if self.inplace or self.editable_mode else Path(self.build_lib) / PACKAGE_PATH

    def run(self) -> None:
        if self.distribution.ext_modules:
            build_native(self._target())

    def get_source_files(self) -> list[str]:
        return [str(SOURCE / "egx.cpp")]

    def get_outputs(self) -> list[str]:
        names = (
            [f"libegx{native_suffix()}", *library_names()] if self.distribution.ext_modules else []
        )
        return [str(self._target() / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class AnyPythonWheel(bdist_wheel):
    """The libraries depend on the platform, not on the Python that loads them with ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


if __name__ == "__main__":
    native = os.environ.get("EGEMMA_BUILD_EXECUTORCH", "1")
    if native not in ("0", "1"):
        raise SystemExit(f"egemma: EGEMMA_BUILD_EXECUTORCH={native!r}: 0 or 1.")
    setup(
        ext_modules=[Extension("egemma._native.libegx", [str(SOURCE / "egx.cpp")])]
        if native == "1"
        else [],
        exclude_package_data={"egemma": ["_native/*.cpp"], "egemma._native": ["*.cpp"]},
        cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
    )
