"""The update agent: keeps a device on the engine that its fleet's publisher signed for it, and on a good one always.

trust.py        what a registry's metadata (The Update Framework) says, and whether it may be believed
clock.py        what time it is at least, whatever the clock says
rollout.py      whether a release is for this device yet
delta.py        files of a new engine, made from those of the one that is here
slots.py        engines on the disk, each whole or not there
activation.py   which of them runs: tried before it is trusted
trial.py        a new engine's golden outputs and latency, in a process of its own
disk.py         what slots and activation do to a disk
update.py       all of it: from news to an engine that runs
"""
