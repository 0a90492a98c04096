"""Starts a command and writes what it used: ``python launcher.py REPORT COMMAND…``.

Linux counts the memory that a process had before it became another program (getrusage(2)). Started by the benchmark,
which is large, every quantizer would seem as large; started by this, it is as large as it is.
"""

import json
import resource
import subprocess
import sys

_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes of one unit of ru_maxrss."""


def main() -> None:
    """Run the command, report, and exit as it did."""
    report, *command = sys.argv[1:]
    try:
        code = subprocess.run(command, check=False).returncode
    except OSError as exc:
        sys.exit(f"{command[0]} does not start: {exc.strerror}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_resident": used.ru_maxrss * _UNIT}
    with open(report, "w", encoding="utf-8") as file:  # noqa: PTH123  # pathlib would only take memory
        json.dump(found, file)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
