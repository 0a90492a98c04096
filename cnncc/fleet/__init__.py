"""Publishing to fleets of devices: who may sign what, releases in a registry, and how far each has gone.

keys.py        the keys of each role: in encrypted files, or with whoever keeps them
signing.py     The Update Framework's metadata of a fleet: made, changed, signed, published
publish.py     bundles become a release; bom.py and provenance.py say what is in its engines, and how they came to be
evidence.py    what is attached to a release in a registry, and what of it may be believed
"""
