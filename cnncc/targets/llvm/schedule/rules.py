"""The rules in the order in which they are tried."""

from __future__ import annotations

from cnncc.targets.llvm.schedule.conv2d import Conv2d
from cnncc.targets.llvm.schedule.driver import Rule
from cnncc.targets.llvm.schedule.generic import Generic
from cnncc.targets.llvm.schedule.loops import Loops
from cnncc.targets.llvm.schedule.matmul import Matmul
from cnncc.targets.llvm.schedule.window import SlidingWindow

RULES: tuple[Rule, ...] = (Conv2d(), SlidingWindow(), Matmul(), Loops(), Generic())
