"""How an engine came to be: a signed statement (in-toto Statement v1, SLSA provenance v1, DSSE v1).

The statement says what the bundle's manifest says of its build, and names by digest the engine's manifest in the
registry, every file of the bundle, and the bill of materials. It is signed by a key of the role `PROVENANCE`, whose
public half the fleet's metadata names: whoever may write to the registry cannot make one.

Whoever signs vouches for what the bundle says; no build service watched the build. That is level 1 of SLSA's build
track.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import FormatError, UnverifiedSignatureError
from securesystemslib.signer import Key, Signer

from cnncc.fleet.bom import BOM
from cnncc_runtime.bundle import CALIBRATION, Manifest, to_plain
from cnncc_runtime.digests import canonical_json, digest_bytes
from cnncc_runtime.errors import UsageError, VerificationFailed
from cnncc_runtime.oci.formats import MANIFEST

PROVENANCE = "provenance"
"""The role that signs it."""

STATEMENT = "application/vnd.in-toto+json"
ENVELOPE = "application/vnd.dsse.envelope.v1+json"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "https://cnncc.dev/provenance/compile/v1"
"""`cnncc compile`; docs/fleet.md says what its parameters are."""
BUILDER = "https://cnncc.dev/provenance/publisher/v1"
"""Whoever holds the fleet's key of the role."""
MODEL_DIGEST = "cnncc-model"
"""Name of the digest over a model's weights, structure and inputs, which is of no file."""

_TYPE = "https://in-toto.io/Statement/v1"


@dataclass(frozen=True)
class Attester:
    """Whose signatures under a statement are believed, and who can make them.

    Attributes:
        keys: keyid → key: those that the fleet's metadata names.
        threshold: How many of them must sign.
        signers: Returns those whose private halves are here; asks for passphrases.
    """

    keys: Mapping[str, Key]
    threshold: int
    signers: Callable[[], Sequence[Signer]]

    def sign(self, statement: bytes) -> bytes:
        """Return a statement in a signed envelope.

        Raises:
            UsageError: Too few private keys are here, or a passphrase is wrong.
        """
        envelope = Envelope(statement, STATEMENT, {})
        for signer in self.signers():
            envelope.sign(signer)
        if len(envelope.signatures) < self.threshold:
            raise UsageError(
                f"{PROVENANCE} needs {self.threshold} keys to sign, {len(envelope.signatures)} of its "
                f"{len(self.keys)} are here",
                hint="bring the folder of keys to this machine, or publish on the one that has it",
            )
        return canonical_json(envelope.to_dict())

    def read(self, data: bytes) -> Provenance:
        """Return what an envelope says, once its signature is believed.

        Raises:
            VerificationFailed: It is signed by none of the keys, it was changed, or it is no provenance.
        """
        envelope = _envelope(data)
        try:
            signed = envelope.verify(list(self.keys.values()), self.threshold)
        except UnverifiedSignatureError as exc:
            strangers = sorted(envelope.signatures.keys() - self.keys.keys())
            known = envelope.signatures.keys() & self.keys.keys()
            raise VerificationFailed(
                "the signature is not of these bytes: the statement was changed, or the signature was"
                if known
                else f"it is signed by {', '.join(f'{each[:16]}…' for each in strangers) or 'nobody'}, and the fleet's "
                "metadata names no such key",
            ) from exc
        return _read(envelope, tuple(sorted(signed)))


@dataclass(frozen=True)
class Provenance:
    """What a signed statement says.

    Attributes:
        keyids: Of the keys that signed it.
        subjects: Name → ``sha256:<hex>``: the engine's manifest and the bundle's files.
        byproducts: The same for what was made beside them: the bill of materials.
        source: The MODEL that was compiled; empty where the bundle does not say.
        tools: Name → version.
    """

    keyids: tuple[str, ...]
    subjects: Mapping[str, str]
    byproducts: Mapping[str, str]
    source: str
    tools: Mapping[str, str]


def statement(bundle: Manifest, engine: str, bom: bytes) -> bytes:
    """Return the statement about an engine; the same engine gives the same bytes.

    Args:
        bundle: The bundle's manifest.
        engine: Digest of the engine's manifest in a registry.
        bom: Its bill of materials.
    """
    target, model = bundle.target, bundle.model
    manifest = {"name": f"{bundle.name}@{target.device}", "mediaType": MANIFEST, "digest": _digest(engine)}
    files = [{"name": name, "digest": _digest(record.sha256)} for name, record in sorted(bundle.files.items())]
    asked = {
        "source": model.get("source", ""),
        "precision": bundle.precision,
        "target": to_plain(target),
        "format": bundle.engine.format,
        "batches": list(bundle.batches),
        "inputs": [str(spec) for spec in bundle.inputs],
    }
    own = bundle.to_bytes()
    return canonical_json(
        {
            "_type": _TYPE,
            "subject": [manifest, *files],
            "predicateType": PREDICATE,
            "predicate": {
                "buildDefinition": {
                    "buildType": BUILD_TYPE,
                    "externalParameters": {name: value for name, value in asked.items() if value},
                    "resolvedDependencies": _dependencies(bundle),
                },
                "runDetails": {
                    "builder": {"id": BUILDER, "version": dict(bundle.toolchain)},
                    "metadata": {"invocationId": digest_bytes(own)},
                    "byproducts": [{"name": "bom", "mediaType": BOM, "digest": _digest(digest_bytes(bom))}],
                },
            },
        }
    )


def unrecorded(bundle: Manifest) -> tuple[str, ...]:
    """Return what a bundle does not say of its build, so that no statement about it can."""
    missing = {"a digest of the model": "digest" in bundle.model, "the tools that built it": bool(bundle.toolchain)}
    return tuple(name for name, there in missing.items() if not there)


def _dependencies(bundle: Manifest) -> list[dict[str, Any]]:
    model = bundle.model
    found: list[dict[str, Any]] = []
    if "digest" in model:
        digest = model["digest"].removeprefix("sha256:")
        found.append({"name": model.get("source", bundle.name), "digest": {MODEL_DIGEST: digest}})
    for name, key in (("exported.onnx", "graph"), ("program.pt2", "program")):
        if key in model:
            found.append({"name": name, "digest": _digest(model[key])})
    if CALIBRATION in bundle.files:
        found.append({"name": CALIBRATION, "digest": _digest(bundle.files[CALIBRATION].sha256)})
    return found


def _digest(digest: str) -> dict[str, str]:
    return {"sha256": digest.removeprefix("sha256:")}


class _Signature(msgspec.Struct):
    keyid: str
    sig: str


class _Envelope(msgspec.Struct):
    payload: str
    payloadType: str
    signatures: list[_Signature]


class _Resource(msgspec.Struct):
    name: str = ""
    digest: dict[str, str] = {}


class _Builder(msgspec.Struct):
    id: str
    version: dict[str, str] = {}


class _RunDetails(msgspec.Struct):
    builder: _Builder
    byproducts: list[_Resource] = []


class _BuildDefinition(msgspec.Struct):
    buildType: str
    externalParameters: dict[str, Any]


class _Predicate(msgspec.Struct):
    buildDefinition: _BuildDefinition
    runDetails: _RunDetails


class _Statement(msgspec.Struct):
    type: str = msgspec.field(name="_type")
    subject: list[_Resource]
    predicateType: str
    predicate: _Predicate


def _envelope(data: bytes) -> Envelope:
    try:
        plain = msgspec.json.decode(data, type=_Envelope)
        envelope = Envelope.from_dict(msgspec.to_builtins(plain))
    except (msgspec.DecodeError, FormatError, ValueError, RecursionError) as exc:
        raise VerificationFailed(f"it is no signed envelope: {exc}") from exc
    if envelope.payload_type != STATEMENT:
        raise VerificationFailed(f"it holds {envelope.payload_type[:80]!r}, and no statement")
    return envelope


def _read(envelope: Envelope, keyids: tuple[str, ...]) -> Provenance:
    try:
        said = msgspec.json.decode(envelope.payload, type=_Statement)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise VerificationFailed(f"what was signed is no provenance: {exc}") from exc
    build = said.predicate.buildDefinition
    if (said.type, said.predicateType, build.buildType) != (_TYPE, PREDICATE, BUILD_TYPE):
        raise VerificationFailed(f"what was signed is no provenance of an engine: {said.predicateType[:80]!r}")
    details = said.predicate.runDetails
    source = build.externalParameters.get("source", "")
    return Provenance(
        keyids,
        _names(said.subject),
        _names(details.byproducts),
        source if isinstance(source, str) else "",
        details.builder.version,
    )


def _names(resources: Sequence[_Resource]) -> dict[str, str]:
    return {each.name: f"sha256:{each.digest.get('sha256', '')}" for each in resources}
