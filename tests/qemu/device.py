"""An AArch64 device without one: Python for that machine under qemu, what `cnncc-runtime` needs, and this checkout's
`cnncc_runtime`.

python tests/qemu/device.py FOLDER WHEELS

FOLDER/root          Debian's Python and its libraries, as they are signed by Debian
FOLDER/site          packages out of PyPI's wheels for AArch64
FOLDER/lib           TVM's virtual machine, out of the wheel in WHEELS
FOLDER/python        runs the device's Python; its children that call `sys.executable` come here again
FOLDER/cnncc-agent   the update agent, as on the device
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cnncc_runtime.files import atomic_folder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
DEVICE = ROOT / "build" / "aarch64" / "device"
"""Where `make arm-device` puts it."""
QEMU = "qemu-aarch64"
CPU = "cortex-a76"
"""A Raspberry Pi 5's, by QEMU's name."""

_SUITE, _PYTHON = "bookworm", "3.11"
_MIRROR = "http://deb.debian.org/debian"
_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
_PACKAGES = (f"python{_PYTHON}-minimal", f"libpython{_PYTHON}-stdlib", "libstdc++6")
_TAGS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
_TVM = "tvm/lib/libtvm_runtime.so"

_RUN_PYTHON = """#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
unset PYTHONDONTWRITEBYTECODE  # compiling what is imported takes seconds under qemu
export PYTHONHOME="$here/root/usr" PYTHONPATH="$here/{runtime}:$here/site" PYTHONPYCACHEPREFIX="$here/cache"
export CNNCC_TVM_RUNTIME="$here/lib"
exec {qemu} -cpu {cpu} -L "$here/root" -0 "$here/python" "$here/root/usr/bin/python{version}" "$@"
"""
_RUN_AGENT = """#!/bin/sh
exec "$(dirname "$(readlink -f "$0")")/python" -c \\
    'import sys; sys.argv[0] = "cnncc-agent"; from cnncc_runtime.agent.cli import main; main()' "$@"
"""


def problem() -> str:
    """Return what is missing here, or an empty text."""
    missing = [] if shutil.which(QEMU) else [QEMU]
    missing += [] if (DEVICE / "cnncc-agent").exists() else [f"a device in {DEVICE}"]
    return f"{', '.join(missing)} not found: `make aarch64 arm-device` brings them" if missing else ""


def require() -> None:
    """Skip the test where there is no device, but in CI fail it."""
    if found := problem():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(found)


def make_device(folder: Path, wheels: Path) -> None:
    """Make the device, whole or not at all.

    Args:
        folder: Its place.
        wheels: Holds TVM's wheel for AArch64 (`make aarch64`).

    Raises:
        CalledProcessError: Debian's or PyPI's mirror was not reached, or this is no Debian.
        FileNotFoundError: There is no apt-get, or no wheel of TVM.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder.resolve(), marker="cnncc-agent") as made:
        _debian(made / "apt", made / "root")
        shutil.rmtree(made / "apt")
        _packages(made / "site")
        _library(wheels, made / "lib")
        runtime = os.path.relpath(ROOT / "runtime", folder.resolve())  # a checkout may be moved
        python = _RUN_PYTHON.format(runtime=runtime, qemu=QEMU, cpu=CPU, version=_PYTHON)
        for program, text in (("python", python), ("cnncc-agent", _RUN_AGENT)):
            (made / program).write_text(text)
            (made / program).chmod(0o755)


def _debian(apt: Path, root: Path) -> None:
    """Fetch Debian's packages by an apt of its own, which checks signatures and knows nothing of this machine's."""
    for part in ("etc/apt.conf.d", "etc/preferences.d", "state/lists/partial", "cache/archives/partial"):
        (apt / part).mkdir(parents=True)
    (apt / "state/status").touch()
    (apt / "etc/sources.list").write_text(f"deb [signed-by={_KEYS}] {_MIRROR} {_SUITE} main\n")
    settings = {
        "Dir::Etc": apt / "etc",
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "state/status",
        "Dir::Cache": apt / "cache",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
    }
    command = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    _run(*command, "update")
    _run(*command, "install", "--download-only", "--yes", "--no-install-recommends", *_PACKAGES)
    root.mkdir()
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        _run("dpkg-deb", "--extract", str(package), str(root))


def _packages(site: Path) -> None:
    project = tomllib.loads((ROOT / "runtime/pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["fleet"]]
    platforms = [f"--platform={tag}_aarch64" for tag in _TAGS]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    _run(*command, "--only-binary=:all:", f"--python-version={_PYTHON}", *platforms, f"--target={site}", *wanted)


def _library(wheels: Path, folder: Path) -> None:
    wheel = next(wheels.glob("apache_tvm-*aarch64.whl"), None)
    if wheel is None:
        raise FileNotFoundError(f"no wheel of TVM in {wheels}")
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        (folder / Path(_TVM).name).write_bytes(archive.read(_TVM))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    make_device(Path(sys.argv[1]), Path(sys.argv[2]))
