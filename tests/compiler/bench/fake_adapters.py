"""Adapters that behave as peers do on good and bad days; workers import this module by name.

Each computes ``y = 2 x`` and implements `cnncc.compiler.bench.adapters.Adapter`. ``options`` steer them:
``ms`` (CPU milliseconds per run), ``factor`` (of the output), ``mark`` (a file to which each run appends a line).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


class Steady:
    """A peer that works."""

    def __init__(self, options):
        self.ms = float(options.get("ms", "0.2"))
        self.factor = np.float32(options.get("factor", "2"))
        self.mark = options.get("mark")
        self.runs = 0

    def load(self):
        return "1.0"

    def open(self, path, threads):
        assert path.exists()
        assert os.environ["OMP_NUM_THREADS"] == os.environ["TVM_NUM_THREADS"] == str(threads)
        if self.mark:
            with Path(self.mark).open("a") as file:
                file.write(f"{os.getpid()}\n")

    def bind(self, names, feeds):
        self.x = feeds[0]

    def run(self):
        self.runs += 1
        end = time.perf_counter() + self.ms / 1e3
        while time.perf_counter() < end:
            pass
        return self.x * self.factor

    def outputs(self):
        return [self.run()]


class Talkative(Steady):
    """Prints to stdout, from Python and from below it."""

    def run(self):
        sys.stdout.write("a banner that would break the protocol\n")
        sys.stdout.flush()
        os.write(1, b"and a native one\n")
        return super().run()


class Late(Steady):
    """Works while it is opened and fails when it is measured."""

    def run(self):
        result = super().run()
        if self.runs > 5:
            self.fail()
        return result

    def fail(self):
        raise ValueError("shapes do not match")


class Crashes(Late):
    """Crashes as native code does."""

    def fail(self):
        sys.stderr.write("double free or corruption\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGSEGV)


class Killed(Late):
    """Is killed by the kernel, as when memory runs out."""

    def fail(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Exits(Late):
    """Ends the process."""

    def fail(self):
        os._exit(7)


class OutOfMemory(Late):
    """Cannot allocate."""

    def fail(self):
        raise MemoryError


class Hangs(Late):
    """Never answers, and has a child that never ends."""

    def open(self, path, threads):
        super().open(path, threads)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        if self.mark:
            with Path(self.mark).open("a") as file:
                file.write(f"{child.pid}\n")

    def fail(self):
        time.sleep(600)


class NotInstalled(Steady):
    """Lacks a library of its own."""

    def load(self):
        import a_module_that_does_not_exist  # noqa: F401


class OnGpu(Steady):
    """Computes on a GPU of its own, which takes half of the time of a run."""

    clock = "CUDA events"
    note = "channels last"

    def device_times(self, runs):
        return (self.ms / 2e3,) * runs


class ByItself(OnGpu):
    """Is a program that times itself."""

    clock = "its own clock"

    def times(self, runs):
        subprocess.run([sys.executable, "-c", ""], check=True)
        return (self.ms / 1e3,) * runs, (self.ms / 4e3,) * runs
