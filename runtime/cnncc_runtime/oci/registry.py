"""What a repository of a registry holds (OCI distribution specification 1.1)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, urljoin

import msgspec

from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import NotInRegistry, RegistryRefused, UsageError, VerificationFailed
from cnncc_runtime.oci.formats import INDEX, LARGEST_MANIFEST, MANIFEST, Descriptor, Index, is_digest, read_index
from cnncc_runtime.oci.http import Connection
from cnncc_runtime.oci.place import Place

_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_NEXT = re.compile(r"<([^>]+)>\s*;\s*rel=\"?next\"?")
_MOST_PAGES = 1000
_OK = frozenset({200})


class _Tags(msgspec.Struct):
    tags: list[str] | None = None


@dataclass
class Repository:
    """Manifests, tags and referrers of one repository; blobs are for `cnncc_runtime.oci.transfer`.

    Attributes:
        place: Which.
        connection: To its registry.
    """

    place: Place
    connection: Connection

    @property
    def pull(self) -> str:
        """What a token must allow for reading."""
        return f"repository:{self.place.name}:pull"

    @property
    def push(self) -> str:
        """What a token must allow for writing."""
        return f"repository:{self.place.name}:pull,push"

    def manifest(self, reference: str) -> bytes:
        """Return a manifest's or an index's bytes.

        Args:
            reference: A digest, which the bytes then have, or a tag, which anybody who may write can move.

        Raises:
            NotInRegistry: There is none.
            VerificationFailed: The bytes are others than the digest's, or too many.
            NetworkFailed: No answer.
        """
        url = self._manifest_url(reference)
        accept = {"Accept": f"{MANIFEST}, {INDEX}"}
        data, _ = self.connection.read(url, scope=self.pull, headers=accept, most=LARGEST_MANIFEST)
        if is_digest(reference) and digest_bytes(data) != reference:
            raise VerificationFailed(
                f"{self.place.host} gave other bytes for {reference}", where=[str(self.place)], hint=_TAMPERED
            )
        return data

    def has(self, reference: str) -> bool:
        """Tell whether there is a manifest of a digest or tag.

        Raises:
            NetworkFailed: No answer.
        """
        accept = {"Accept": f"{MANIFEST}, {INDEX}"}
        return self._exists(self._manifest_url(reference), accept)

    def has_blob(self, digest: str) -> bool:
        """Tell whether there is a blob.

        Raises:
            NetworkFailed: No answer.
        """
        return self._exists(self.blob_url(digest), {})

    def small_blob(self, blob: Descriptor, *, most: int) -> bytes:
        """Return a blob's bytes; large ones are for `cnncc_runtime.oci.transfer`.

        Args:
            blob: Which.
            most: Bytes that it may have.

        Raises:
            NotInRegistry: There is none.
            VerificationFailed: The bytes are others than the digest's, or too many.
            NetworkFailed: No answer.
        """
        data, _ = self.connection.read(self.blob_url(blob.digest), scope=self.pull, most=min(blob.size, most))
        if digest_bytes(data) != blob.digest:
            raise VerificationFailed(
                f"{self.place.host} gave other bytes for {blob.digest}", where=[str(self.place)], hint=_TAMPERED
            )
        return data

    def put_manifest(self, data: bytes, media_type: str, *, tag: str = "") -> str:
        """Store a manifest or an index, what it lists being there, and return its digest.

        Args:
            data: Its bytes.
            media_type: `MANIFEST` or `INDEX`.
            tag: Names it, too; what had that name loses it.

        Raises:
            NetworkFailed: It was not stored.
            VerificationFailed: The registry says that it stored something else.
        """
        digest, _ = self._put(data, media_type, tag)
        return digest

    def refer(self, data: bytes, entry: Descriptor, subject: str) -> None:
        """Store a manifest that refers to another one, and see that it is listed among that one's referrers.

        Registries without the referrers API list them in an index under a tag made of the subject's digest, which
        clients keep (OCI distribution specification 1.1, "Pushing Manifests with Subject"). Two that write at the same
        time lose one entry: whoever publishes holds a lock.

        Args:
            data: The manifest's bytes; its ``subject`` is ``subject``.
            entry: What describes it.
            subject: The other one's digest.

        Raises:
            NetworkFailed: It was not stored.
            VerificationFailed: What is under the tag is no index.
        """
        tag = _fallback(subject)
        _, listed = self._put(data, entry.media_type, "")
        if listed:
            return
        others = [old for old in self._fallback_entries(subject) if old.digest != entry.digest]
        self.put_manifest(Index("", (*others, entry)).to_bytes(), INDEX, tag=tag)

    def referrers(self, subject: str, artifact_type: str = "") -> tuple[Descriptor, ...]:
        """Return what refers to a manifest; whoever may write can add to it, and take away.

        Args:
            subject: The manifest's digest.
            artifact_type: Only those of it, unless empty.

        Raises:
            VerificationFailed: The registry's list is no index.
            NetworkFailed: No answer.
        """
        url = f"{self.place.url}/referrers/{_digest(subject)}"
        try:
            data, _ = self.connection.read(url, scope=self.pull, headers={"Accept": INDEX}, most=LARGEST_MANIFEST)
            entries = read_index(data).manifests
        except NotInRegistry:
            entries = self._fallback_entries(subject)
        return tuple(entry for entry in entries if artifact_type in ("", entry.artifact_type))

    def tags(self) -> frozenset[str]:
        """Return all tags; none where there is no such repository.

        Raises:
            NetworkFailed: No answer.
            VerificationFailed: The answer is no list of tags.
        """
        found: set[str] = set()
        url: str | None = f"{self.place.url}/tags/list?n=1000"
        for _ in range(_MOST_PAGES):
            if url is None:
                return frozenset(found)
            try:
                page, answered = self.connection.read(url, scope=self.pull, most=LARGEST_MANIFEST)
            except NotInRegistry:
                return frozenset(found)
            try:
                found.update(msgspec.json.decode(page, type=_Tags).tags or [])
            except (msgspec.DecodeError, UnicodeDecodeError) as exc:
                raise VerificationFailed(f"{self.place.host} gave no list of tags: {exc}") from exc
            following = _NEXT.search(answered.get("Link", ""))
            url = self.on_registry(following[1]) if following else None
        raise VerificationFailed(f"{self.place.host} lists tags without end")

    def blob_url(self, digest: str) -> str:
        """Return a blob's address."""
        return f"{self.place.url}/blobs/{_digest(digest)}"

    def on_registry(self, address: str) -> str:
        """Return an address that the registry named, whole.

        Raises:
            RegistryRefused: It is another machine's, which must not see our login.
        """
        root = f"{self.place.scheme}://{self.place.host}/"
        made = urljoin(root, address)
        if not made.startswith(root):
            raise RegistryRefused(f"{self.place.host} sends us on to another registry: {made[:80]}")
        return made

    def _manifest_url(self, reference: str) -> str:
        if not is_digest(reference) and not _TAG.fullmatch(reference):
            raise UsageError(f"'{reference}' is neither a tag nor a sha256 digest")
        return f"{self.place.url}/manifests/{quote(reference, safe=':')}"

    def _exists(self, url: str, headers: dict[str, str]) -> bool:
        try:
            with self.connection.request("HEAD", url, scope=self.pull, headers=headers):
                return True
        except NotInRegistry:
            return False

    def _put(self, data: bytes, media_type: str, tag: str) -> tuple[str, bool]:
        """Return the digest, and whether the registry listed it among the referrers of its subject."""
        digest = digest_bytes(data)
        url = self._manifest_url(tag or digest)
        with self.connection.request(
            "PUT",
            url,
            scope=self.push,
            headers={"Content-Type": media_type},
            body=lambda: data,
            good=frozenset({201, 202}),
        ) as response:
            stored = response.headers.get("Docker-Content-Digest", digest)
            listed = "OCI-Subject" in response.headers
        if stored != digest:
            raise VerificationFailed(f"{self.place.host} stored {stored} where {digest} was sent", hint=_TAMPERED)
        return digest, listed

    def _fallback_entries(self, subject: str) -> tuple[Descriptor, ...]:
        try:
            return read_index(self.manifest(_fallback(subject))).manifests
        except NotInRegistry:
            return ()


_TAMPERED = "is there a proxy in between that changes what passes? The registry may have been tampered with"


def _digest(text: str) -> str:
    if not is_digest(text):
        raise UsageError(f"'{text[:80]}' is no sha256 digest")
    return text


def _fallback(subject: str) -> str:
    return _digest(subject).replace(":", "-")
