"""OCI registries: where releases of engines lie, and the metadata that says which may be trusted.

    place.py        which registry, which repository
    formats.py      descriptors, manifests, indexes (OCI image specification 1.1), out of bytes that may be hostile
    credentials.py  whom a registry takes us for: Docker's configuration and credential helpers
    http.py         requests: deadlines, retries, authentication
    registry.py     what a repository holds: manifests, blobs, tags, referrers (OCI distribution specification 1.1)
    transfer.py     large blobs, either way, resumed where they broke off

Nothing of it trusts a registry: what is fetched by digest is compared with it, what is fetched by tag is not believed
until something signed names its digest.
"""
