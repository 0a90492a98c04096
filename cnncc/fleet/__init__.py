"""Publishing to fleets of devices: who may sign what, releases in a registry, and how far each has gone.

keys.py     the keys of each role: in encrypted files, or with whoever keeps them
signing.py  The Update Framework's metadata of a fleet: made, changed, signed, published
lock.py     one publisher at a time, of however many machines
rollout.py  which release a channel points to, and how many of its devices take it
export.py, bring.py  releases in archives, and from there into other registries
"""
