"""The agent as a service of systemd: its unit, with what this installation is called.

systemd/cnncc-agent.service        of the machine: a user of its own, and walls (systemd.exec(5))
systemd/cnncc-agent.user.service   of a user: what of the walls needs no privileges
"""

from __future__ import annotations

import string
import sys
from collections.abc import Sequence
from pathlib import Path

from cnncc_runtime.errors import UsageError

USER = "cnncc-agent"
"""Whom the machine's service runs as."""
STATE = Path("/var/lib/cnncc-agent")
"""The folder that systemd makes for it."""

_TEMPLATES = Path(__file__).with_name("systemd")
_HIDDEN = (Path("/home"), Path("/root"), Path("/run/user"))  # systemd.exec(5), ProtectHome


def unit_text(folder: Path, arguments: Sequence[str] = (), *, user: bool = False) -> str:
    """Return a unit, to be written to ``/etc/systemd/system`` or, a user's, to ``~/.config/systemd/user``.

    Args:
        folder: The agent's.
        arguments: Of ``cnncc-agent run``.
        user: Whether it is for a user's own systemd.

    Raises:
        UsageError: The machine's service could not reach this installation, or the folder.
    """
    program = Path(sys.executable)
    if not user:
        _check_visible(program, "python3 -m venv /opt/cnncc && /opt/cnncc/bin/pip install 'cnncc-runtime[fleet]'")
        _check_visible(folder, "choose another --folder, or --user")
    words = [str(program), "-m", "cnncc_runtime.agent", "--folder", str(folder.absolute()), "run", *arguments]
    own = folder.absolute() == STATE
    writes = (
        f"StateDirectory={STATE.name}\nStateDirectoryMode=0755"
        if own
        else f"ReadWritePaths={_quoted(folder.absolute())}"
    )
    name = "cnncc-agent.user.service" if user else "cnncc-agent.service"
    template = string.Template((_TEMPLATES / name).read_text("utf-8"))
    return template.substitute(
        command=" ".join(_quoted(word).replace("$", "$$") for word in words), user=USER, writes=writes
    )


def _check_visible(path: Path, hint: str) -> None:
    if any(path.absolute().is_relative_to(hidden) for hidden in _HIDDEN):
        raise UsageError(f"{path} is in a home folder, which the service does not see", hint=hint)


def _quoted(word: object) -> str:
    """Return a word of a command as it stands in a unit (systemd.service(5), "Command lines")."""
    text = str(word).replace("%", "%%")
    if text and not set(text) & set(" \t\n\"'\\;"):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'
