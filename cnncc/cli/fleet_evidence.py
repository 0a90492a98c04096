"""What ``cnncc fleet show`` says of a release and of what is attached to its engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from cnncc.cli.render import MARKS, Render, size_text

if TYPE_CHECKING:
    from cnncc.fleet.evidence import Attached, ReleaseEvidence


def evidence_document(name: str, found: ReleaseEvidence) -> dict[str, Any]:
    """Return it for ``--json``."""
    engines = []
    for engine in found.engines:
        target, provenance = engine.bundle.target, engine.examined.provenance
        assert provenance is not None
        engines.append(
            {
                "device": target.device,
                "machine": target.machine,
                "precision": engine.bundle.precision,
                "bytes": engine.bytes,
                "digest": engine.examined.digest,
                "source": provenance.source,
                "tools": dict(provenance.tools),
                "signed_by": list(provenance.keyids),
                "referrers": [
                    {
                        "type": each.artifact_type,
                        "digest": each.digest,
                        "bytes": each.size,
                        "files": list(each.names),
                        "believed": each.believed,
                        "why": each.said,
                    }
                    for each in engine.examined.attached
                ],
            }
        )
    return {
        "name": name,
        "version": found.version,
        "digest": found.digest,
        "channels": list(found.channels),
        "engines": engines,
    }


def evidence_text(render: Render, name: str, found: ReleaseEvidence) -> None:
    """Print it."""
    unsigned = f"in no channel: no signature says that {found.version} is this release"
    where = f"in {', '.join(found.channels)}" if found.channels else unsigned
    render.line(escape(f"{name}@{found.version}  {found.digest}, {where}"))
    for engine in found.engines:
        target, provenance = engine.bundle.target, engine.examined.provenance
        assert provenance is not None
        render.line()
        what = f"{target.machine}, {engine.bundle.precision}, {size_text(engine.bytes)}  {engine.examined.digest}"
        render.line(f"[bold]{escape(target.device)}[/]  {escape(what)}")
        source = provenance.source or "a model that it does not name"
        render.line(escape(f"  built from {source} by {_tools(provenance.tools)}"))
        for each in engine.examined.attached:
            render.line(f"  {_mark(each)} {escape(_text(each))}")


def _tools(tools: Mapping[str, str]) -> str:
    return f"cnncc {tools['cnncc']}" if "cnncc" in tools else "tools that it does not name"


def _mark(attached: Attached) -> str:
    return MARKS["ok" if attached.believed else "note"]


def _text(attached: Attached) -> str:
    from cnncc.fleet.bom import BOM
    from cnncc.fleet.provenance import STATEMENT
    from cnncc_runtime.releases import EVIDENCE

    names = {STATEMENT: "provenance", BOM: "bill of materials", EVIDENCE: "evidence"}
    name = names.get(attached.artifact_type, attached.artifact_type or "of no type")
    said = attached.said or "as the provenance names it"
    files = f" ({', '.join(attached.names)})" if len(attached.names) > 1 else ""
    return f"{name}{files}, {size_text(attached.size)}: {said if attached.believed else f'not believed: {said}'}"
