"""The update agent: keeps a device on the engine that its fleet's publisher signed for it, and on a good one always.

trust.py   what a registry's metadata (The Update Framework) says, and whether it may be believed
clock.py   what time it is at least, whatever the clock says
    trial.py   a new engine's golden outputs and latency, in a process of its own
    rollout.py   whether a release is for this device yet
"""
