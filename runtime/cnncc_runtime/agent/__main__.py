"""``cnncc-agent``, and ``python -m cnncc_runtime.agent``, which services call by the path of their Python."""

from __future__ import annotations

import sys

from cnncc_runtime.errors import DependencyMissing


def main() -> None:
    """Run the command line, or say what it needs that is not installed."""
    try:
        from cnncc_runtime.agent.cli import main as run
    except ModuleNotFoundError as exc:
        hint = "pip install 'cnncc-runtime[fleet]'"
        sys.stderr.write(f"✗ {DependencyMissing(f'the update agent needs {exc.name}', hint=hint)}\n")
        sys.exit(DependencyMissing.exit_code)
    run()


if __name__ == "__main__":
    main()
