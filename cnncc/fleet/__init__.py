"""Publishing to fleets of devices: who may sign what, releases in a registry, and how far each has gone.

home.py        what a publisher's machine keeps of a fleet
keys.py        the keys of each role; signers.py opens them: encrypted files, tokens, services that keep keys
signing.py     The Update Framework's metadata of a fleet: made, changed, signed, published
ceremony.py    a new root whose keys lie on several machines
lock.py        one publisher at a time, of however many machines
publish.py     bundles become a release; bom.py and provenance.py say what is in its engines, and how they came to be
evidence.py    what is attached to a release in a registry, and what of it may be believed
rollout.py     which release a channel points to, and how many of its devices take it
export.py, bring.py  releases in archives, and from there into other registries
watch.py       pauses rollouts that fail too often, by what the collector (collector/) was told
"""
