"""A fleet's life in one go: signed releases, a canary, a rollout by percent, and what goes wrong. `make fleet-demo`.

All parts are real: Debian's docker-registry, the collector, and three devices with the update agent, one of them an
AArch64 machine under qemu. Each step says what must come out, and the demo fails where something else does.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import requests

from cnncc_runtime.agent.rollout import place_of_device
from cnncc_runtime.bundle import GOLDEN, read_bundle, write_bundle
from cnncc_runtime.cpu import host_machine

EXAMPLES = Path(os.path.relpath(Path(__file__).parents[1]))
sys.path.insert(0, str(EXAMPLES))

from parts import ARM_DEVICE, Device, collector, fail, registry, run, say  # noqa: E402

DIGITS = EXAMPLES / "digits"
OUT = Path("build/fleet-demo")
DATABASE = f"sqlite:///{OUT}/fleet.db"
NAME = "digits"
DEVICES = (
    Device("lab", "x86_64", "canary", OUT / "devices/lab"),
    Device("hall-1", "x86_64", "stable", OUT / "devices/hall-1"),
    Device("hall-2", "aarch64", "stable", OUT / "devices/hall-2"),
)
LAB, HALL_1, HALL_2 = DEVICES
ARM_PROFILE = "raspberry-pi-5"
FIRST, BETTER, SMALLER, WRONG = "1.0.0", "1.1.0", "1.2.0", "1.3.0"
REFUSED, FAILED, NOTHING = 30, 50, 10
"""Exit codes of the agent: not to be believed; the new engine failed; nothing to do."""
CALM = ("--slowdown", "50")
"""A new engine may take that many times as long as the one before: this machine does other things beside the demo."""
REQUIRED_ACCURACY = 0.9


def train(version: str, epochs: int) -> None:
    """Train the digits CNN, on one thread: it is too small for more, which would only wait for one another."""
    command = ("python", DIGITS / "train.py", "--epochs", str(epochs), "--out", OUT / version)
    run(*command, env={"OMP_NUM_THREADS": "1"})


def build(version: str, weights: str, *flags: str) -> None:
    """Compile a version for both machines and prove both engines, one of them under emulation."""
    made = bundles(version)
    made[0].parent.mkdir(exist_ok=True)
    run(
        *("cnncc", "compile", f"{DIGITS / 'model.py'}:build", "--weights", OUT / weights / "digits.safetensors"),
        *("--input-shape", "1,3,28,28", "--target", "llvm", "--device", "host", "--device", ARM_PROFILE, *flags),
        *("--data", OUT / weights / "heldout.npz", "-o", made[0].with_name(f"{NAME}.cnncc")),
    )
    run("cnncc", "verify", made[1], "--emulate", says="parity passed")


def bundles(version: str) -> tuple[Path, Path]:
    """Return a version's bundles: for this machine, and for the AArch64 one."""
    host, arm = (OUT / version / f"{NAME}-llvm-{device}.cnncc" for device in ("host", ARM_PROFILE))
    return host, arm


def publish(version: str, *flags: str) -> None:
    """Publish a version to the canary channel."""
    release = ("--name", NAME, "--version", version, "--channel", "canary")
    run("cnncc", "publish", *bundles(version), *release, *CALM, *flags)


def enroll(registry_url: str, collector_url: str) -> None:
    """Make each device one of the fleet's, with a token of its own for the collector."""
    for device in DEVICES:
        token = OUT / f"{device.name}.token"
        token.write_text(run("cnncc", "fleet", "token", "device", device.name, "--database", DATABASE))
        device.agent(
            *("enroll", "--root", OUT / "publisher" / NAME / "root.json", "--registry", registry_url, "--name", NAME),
            *("--channel", device.channel, "--device", device.name),
            *("--report", f"{collector_url}/reports", "--report-token", token),
        )


def begin() -> None:
    """The first release goes to every device."""
    say("Train the digits CNN; compile it for this machine and for a Raspberry Pi 5; prove both engines")
    train(FIRST, 2)
    build(FIRST, FIRST)
    say("Publish it to the canary channel, then promote it to stable: all devices take it")
    publish(FIRST)
    HALL_1.agent("once", code=NOTHING, says="nothing is announced in stable")
    run("cnncc", "fleet", "promote", f"{NAME}@{FIRST}", "--from", "canary", "--to", "stable")
    for device in DEVICES:
        device.agent("once", says=f"✓ runs release {FIRST}")


def roll_out() -> None:
    """A better release: the canary first, then 40 % of the others, then all."""
    say("Train for longer, and publish that to the canary alone")
    train(BETTER, 3)
    build(BETTER, BETTER)
    publish(BETTER)
    LAB.agent("once", says=f"✓ runs release {BETTER}")
    HALL_1.agent("once", code=NOTHING, says="the device has had it")

    say("40 % of the stable channel: a hash of release and device says who comes when")
    for device in (HALL_1, HALL_2):
        print(f"{device.name}  comes at {place_of_device(BETTER, device.name) / 100:g} %")
    few = ("--from", "canary", "--to", "stable", "--percent", "40", *CALM)
    run("cnncc", "fleet", "promote", f"{NAME}@{BETTER}", *few)
    HALL_1.agent("once", code=NOTHING, says="it is for 40 % of the devices")
    HALL_2.agent("once", says=f"✓ runs release {BETTER}")

    say("100 %")
    run("cnncc", "fleet", "promote", f"{NAME}@{BETTER}", "--to", "stable", "--percent", "100")
    HALL_1.agent("once", says=f"✓ runs release {BETTER}")
    HALL_2.agent("once", code=NOTHING, says="the device has had it")


def mirror(registry_url: str) -> None:
    """Other tools read the registry: a release goes into an OCI layout and back, and its digests stay."""
    say("skopeo copies a release out and back: what is signed is a digest, so the copy is as good as the original")
    if shutil.which("skopeo") is None:
        print("left out: apt-get install skopeo")
        return
    host = registry_url.removeprefix("http://")
    copy = ("skopeo", "--insecure-policy", "copy", "--quiet", "--all", "--preserve-digests")
    layout = f"oci:{OUT / 'layout'}:{BETTER}"
    run(*copy, "--src-tls-verify=false", f"docker://{host}/{NAME}:{BETTER}", layout)
    run(*copy, "--dest-tls-verify=false", layout, f"docker://{host}/mirror:{BETTER}")
    accept = {"Accept": "application/vnd.oci.image.index.v1+json"}
    answers = [
        requests.get(f"{registry_url}/v2/{name}/manifests/{BETTER}", headers=accept, timeout=10)
        for name in (NAME, "mirror")
    ]
    if not all(answer.ok for answer in answers) or answers[0].content != answers[1].content:
        fail("the copy's index is not the original's")
    print(f"both are {answers[1].headers['Docker-Content-Digest']}")


def tamper() -> None:
    """A byte of an engine changes on the registry's disk: the device refuses it, and runs on."""
    say("A smaller release; somebody changes one byte of its engine on the registry's disk")
    build(SMALLER, BETTER, "--no-winograd")
    publish(SMALLER, "--no-delta")  # by a delta, a device would never ask for the file that is changed
    digest = read_bundle(bundles(SMALLER)[0]).manifest.files["engine.so"].sha256.removeprefix("sha256:")
    blob = OUT / "registry/docker/registry/v2/blobs/sha256" / digest[:2] / digest / "data"
    good = blob.read_bytes()
    blob.write_bytes(good[:1000] + bytes([good[1000] ^ 1]) + good[1001:])
    LAB.agent("once", code=REFUSED)
    expect(LAB, BETTER)
    say("The registry is mended: the device takes what it refused before")
    blob.write_bytes(good)
    LAB.agent("once", says=f"✓ runs release {SMALLER}")


def mix_up() -> list[Path]:
    """Return bundles of the first version's engines with the better one's golden outputs."""
    made = []
    for old, new in zip(bundles(FIRST), bundles(BETTER), strict=True):
        manifest = read_bundle(old).manifest
        files = {name: (record.role, old / name) for name, record in manifest.files.items()}
        files[GOLDEN] = (files[GOLDEN][0], new / GOLDEN)
        path = OUT / WRONG / old.name
        path.mkdir(parents=True)
        write_bundle(path, replace(manifest, parity="pending"), files)
        made.append(path)
    return made


def fail_and_go_back(collector_url: str, viewer: str) -> None:
    """A release that computes something else: devices go back by themselves, and the rollout is paused."""
    say(f"The engines of {FIRST} under the golden outputs of {BETTER}: mixed up after the proof, and signed")
    wrong = mix_up()
    allowed = [word for path in wrong for word in ("--unproven", path)]
    run(
        *("cnncc", "publish", *wrong, *allowed, "--name", NAME, "--version", WRONG, "--channel", "stable"),
        *("--halt-on-failure-pct", "10", "--halt-after", "2"),
    )
    for device in (HALL_1, HALL_2):
        device.agent("once", code=FAILED, says="the engine before it runs on")
        expect(device, BETTER)
    HALL_1.agent("once", code=NOTHING, says="the device has had it")

    say("The collector has heard of it; whoever watches pauses the rollout")
    watch = ("cnncc", "fleet", "watch", NAME, "--collector", collector_url)
    run(*watch, code=1, says="PAUSED NOW", env={"CNNCC_FLEET_TOKEN": viewer})
    run("cnncc", "fleet", "status", NAME, says="paused")

    say("Back to the release before, for all devices")
    run("cnncc", "fleet", "rollback", NAME, says=BETTER)
    for device in (HALL_1, HALL_2):
        device.agent("once", code=NOTHING, says="the device runs that engine already")


def running(device: Device) -> str:
    """Return the version whose very engine and weights a device's applications load."""
    found = read_bundle(device.current).manifest.files
    same = [
        version
        for version in (FIRST, BETTER, SMALLER)
        for bundle in bundles(version)
        if all(read_bundle(bundle).manifest.files[name].sha256 == record.sha256 for name, record in found.items())
    ]
    if len(same) != 1:
        fail(f"{device.name} runs something that nobody published")
    return same[0]


def expect(device: Device, version: str) -> None:
    """See that a device runs a version, whole."""
    found = running(device)
    if not device.status()["whole"] or found != version:
        fail(f"{device.name} should run {version}, whole; it has {found}")
    print(f"{device.name} runs {version}", flush=True)


def applications() -> None:
    """On each device an application classifies the held-out pictures with the engine that the agent trusts."""
    say("What the devices run in the end, and how many of the held-out pictures their applications get right")
    print(f"{'device':8}  {'machine':8}  {'channel':8}  {'runs':6}  {'refuses':>7}  {'right':>9}")
    for device, version, refused in ((LAB, SMALLER, 0), (HALL_1, BETTER, 1), (HALL_2, BETTER, 1)):
        status = device.status()
        told = device.ask(EXAMPLES / "classify.py", device.current, OUT / FIRST / "heldout.npz")
        bad = len(status["state"]["bad"])
        print(
            f"{device.name:8}  {device.machine:8}  {device.channel:8}  {running(device):6}  {bad:>7}"
            f"  {told['right']} / {told['of']}",
            flush=True,
        )
        if (running(device), bad) != (version, refused) or told["right"] < REQUIRED_ACCURACY * told["of"]:
            fail(f"{device.name} should run {version}, refuse {refused}, and be right more often")


def photograph(collector_url: str, viewer: str) -> None:
    """Take a picture of the collector's page."""
    say("The collector's page")
    chromium = shutil.which("chromium")
    if chromium is None:
        print(f"no picture of {collector_url}: apt-get install chromium")
        return
    picture = OUT / "status.png"
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, "--headless", "--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        command += ["--hide-scrollbars", "--window-size=1200,1000", f"--user-data-dir={profile}"]
        command += [f"--screenshot={picture.resolve()}", collector_url.replace("//", f"//viewer:{viewer}@")]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if not picture.exists():
        fail(f"chromium took no picture: {done.stderr}")
    print(f"its picture is {picture}")


def main() -> None:
    """Run every act; whatever ends it, nothing stays behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start = time.monotonic()
    if host_machine() != "x86_64":
        fail("this demo is of an x86-64 machine with an AArch64 device under qemu")
    if not (ARM_DEVICE / "cnncc-agent").exists():
        fail(f"there is no AArch64 device in {ARM_DEVICE}: make arm-device")
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    os.environ["CNNCC_FLEET_HOME"] = str(OUT / "publisher")
    os.environ["CNNCC_FLEET_PASSPHRASE"] = secrets.token_urlsafe()
    with contextlib.ExitStack() as stack:
        say("A registry, a fleet in it, and a collector of what its devices report")
        registry_url = stack.enter_context(registry(OUT / "registry"))
        collector_url = stack.enter_context(collector(DATABASE, OUT / "collector.log"))
        run("cnncc", "fleet", "trust", "init", "--registry", registry_url, "--name", NAME)
        say("Three devices: two of this machine's kind, and one with an AArch64 CPU, under qemu")
        enroll(registry_url, collector_url)
        viewer = run("cnncc", "fleet", "token", "viewer", "demo", "--database", DATABASE).strip()
        begin()
        roll_out()
        mirror(registry_url)
        tamper()
        fail_and_go_back(collector_url, viewer)
        run("cnncc", "fleet", "status", NAME)
        applications()
        photograph(collector_url, viewer)
    print(f"\nDone in {time.monotonic() - start:.0f} s. Everything is in {OUT}.")


if __name__ == "__main__":
    main()
