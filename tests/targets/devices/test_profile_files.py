"""Devices as files: ours are sound, a user's are read or refused by file and field."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cnncc.targets.devices import find_device, llvm_lists, profile_names, resolve_profile
from cnncc.targets.devices.isa import isa_of_triple
from cnncc.targets.devices.profile_files import FOLDER_VARIABLE, check, our_devices
from cnncc_runtime.errors import UsageError

BOARD = {
    "description": '"a board"',
    "triple": '"aarch64-linux-gnu"',
    "cpu": '"cortex-a76"',
    "features": '["neon", "fp-armv8", "dotprod"]',
    "cores": "2",
    "glibc": '"2.31"',
}


def write(path: Path, **changes: str | None) -> Path:
    """Write a device's file; None leaves a field out."""
    fields = {**BOARD, **changes}
    path.write_text("".join(f"{name} = {value}\n" for name, value in fields.items() if value is not None))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", our_devices())
def test_llvm_uses_just_the_features_that_a_device_of_ours_lists(name: str) -> None:
    device = our_devices()[name]
    check(device)
    assert resolve_profile(name) == device.profile
    isa = isa_of_triple(device.profile.triple)
    assert device.emulator is None or device.emulator.binary == {"arm": "qemu-arm"}.get(
        isa.machine, f"qemu-{isa.machine}"
    )


@pytest.mark.parametrize(
    ("name", "has", "lacks"),
    [
        ("raspberry-pi-4", {"neon"}, {"dotprod", "fullfp16"}),
        ("raspberry-pi-5", {"dotprod", "fullfp16"}, {"i8mm", "bf16"}),
        ("graviton3", {"i8mm", "bf16", "dotprod"}, {"sve", "sve2"}),
        ("cortex-a7", {"neon", "vfp4"}, set()),
        ("x86-64-v2", {"sse4.2"}, {"avx"}),
        ("x86-64-v3", {"avx2", "fma"}, {"avx512f"}),
        ("x86-64-v4", {"avx512f", "avx512vl"}, {"avx512vnni"}),
        ("riscv64", {"f", "d"}, {"v"}),
    ],
)
def test_devices_have_the_features_that_they_are_known_for(name: str, has: set[str], lacks: set[str]) -> None:
    features = set(resolve_profile(name).features)
    assert has <= features
    assert not lacks & features


def test_sve_is_turned_off_where_the_cpu_has_it_and_the_device_does_not_list_it() -> None:
    assert "-sve" in llvm_lists.attributes(resolve_profile("graviton3"))
    assert "+sve" not in llvm_lists.attributes(resolve_profile("graviton3"))


def test_users_add_devices_to_their_folder(folder: Path) -> None:
    write(folder / "my-board.toml", memory="512")
    assert "my-board" in profile_names()
    profile = resolve_profile("my-board")
    assert (profile.name, profile.cpu, profile.cores) == ("my-board", "cortex-a76", 2)
    assert profile.features == ("dotprod", "fp-armv8", "neon")
    assert find_device("my-board").memory == 512
    assert find_device("my-board").emulator is None


def test_a_device_is_taken_from_a_file_anywhere(tmp_path: Path) -> None:
    assert resolve_profile(str(write(tmp_path / "other.toml"))).name == "other"


def test_flags_change_a_device() -> None:
    without = resolve_profile("raspberry-pi-5", mattr=["-dotprod"])
    assert set(resolve_profile("raspberry-pi-5").features) - set(without.features) == {"dotprod"}
    assert without.cores == 4
    assert resolve_profile("raspberry-pi-5", mcpu="cortex-a72").features == resolve_profile("raspberry-pi-4").features


@pytest.mark.parametrize(
    ("changes", "says", "field"),
    [
        ({"corse": "4"}, "corse", ""),
        ({"cores": None}, "cores", ""),
        ({"cores": '"four"'}, "$.cores", ""),
        ({"cores": "0"}, "$.cores", ""),
        ({"features": '"neon"'}, "$.features", ""),
        ({"glibc": '"musl"'}, "$.glibc", ""),
        ({"qemu": '{binary = "/bin/sh", cpu = "max"}'}, "$.qemu.binary", ""),
        ({"triple": '"aarch46-linux-gnu"'}, "aarch64-linux-gnu", "triple"),
        ({"triple": '"aarch64-apple-macos"'}, "Linux", "triple"),
        ({"cpu": '"cortex-a67"'}, "cortex-a76", "cpu"),
        ({"features": '["neon", "fp-armv8", "dotprot"]'}, "dotprod", "features"),
        ({"features": '["neon", "dotprod"]'}, "fp-armv8", "features"),
        ({"description": "unquoted"}, "no device", ""),
    ],
)
def test_a_bad_file_is_refused_by_file_and_field(
    changes: dict[str, str | None], says: str, field: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "board.toml", **changes)
    with pytest.raises(UsageError) as caught:
        resolve_profile(str(path))
    assert says in str(caught.value)
    assert caught.value.where == ((f"{path}: {field}",) if field else (str(path),))
    assert caught.value.hint


@pytest.mark.parametrize("name", ["host", "raspberry-pi-4", "sm89", "jetson-orin"])
def test_a_name_is_not_given_twice(name: str, folder: Path) -> None:
    path = write(folder / f"{name}.toml")
    for asked in ("raspberry-pi-5", "my-board", str(path)):
        with pytest.raises(UsageError, match=f"there is a device '{name}' already"):
            resolve_profile(asked)


@pytest.mark.parametrize("name", ["Board.toml", "a board.toml", "-x.toml"])
def test_files_are_named_as_devices_are(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no name of a device"):
        resolve_profile(str(write(tmp_path / name)))


def test_what_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        resolve_profile(str(tmp_path / "gone.toml"))
    with pytest.raises(UsageError, match="raspberry-pi-5"):
        resolve_profile("rasperry-pi-5")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(UsageError, match="is no folder"):
        profile_names()


def test_a_device_is_one_machine(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="raspberry-pi-4 is no x86_64 machine"):
        resolve_profile("raspberry-pi-4", mtriple="x86_64-linux-gnu")


def test_listing_devices_asks_no_compiler() -> None:
    code = (
        "import sys; from cnncc.targets.devices import file_devices, profile_names, resolve_profile; "
        "file_devices(); profile_names(); resolve_profile('raspberry-pi-4'); "
        "assert not {'tvm', 'onnx', 'torch'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
