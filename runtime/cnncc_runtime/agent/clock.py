"""What time it is at least, whatever a device's clock says.

Devices without a battery wake in 1970, and whoever can set a clock back can make metadata that expired pass for fresh.
So a floor is kept: the latest time at which metadata was found fresh. It advances with the time that the machine has
run since, which needs no clock, and no wrong clock can move it beyond what was signed, since what has expired moves
nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True)
class Moment:
    """A point of time, and how long the machine had run then.

    Attributes:
        time: Seconds since 1970, UTC.
        boot: Names the run of the machine since its start.
        ran: Seconds of it.
    """

    time: float = 0.0
    boot: str = ""
    ran: float = 0.0


def _boot() -> str:
    try:
        return _BOOT.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


@dataclass(frozen=True)
class Clock:
    """The machine's clock, and what is known without it.

    Attributes:
        wall: What the clock says: seconds since 1970, UTC.
        ran: Seconds since the machine started, those asleep included.
        boot: See `Moment`.
    """

    wall: Callable[[], float] = time.time
    ran: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
    boot: Callable[[], str] = _boot

    def now(self, floor: Moment) -> Moment:
        """Return what time it is: no earlier than the floor, and what the machine has run since it.

        Args:
            floor: A time that has passed.
        """
        boot, ran = self.boot(), self.ran()
        since = max(0.0, ran - floor.ran) if boot and boot == floor.boot else 0.0
        return Moment(max(self.wall(), floor.time + since), boot, ran)

    def is_behind(self, floor: Moment) -> bool:
        """Tell whether the clock was set back, or never set."""
        return self.wall() < floor.time - 60.0


def as_date(seconds: float) -> datetime:
    """Return seconds since 1970 as a date."""
    return _EPOCH + timedelta(seconds=seconds)
