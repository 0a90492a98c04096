"""The rules in the order in which they are tried."""

from __future__ import annotations

from cnncc.targets.llvm.schedule.channels import GatherChannels
from cnncc.targets.llvm.schedule.conv2d import Conv2d, IntegerConv2d
from cnncc.targets.llvm.schedule.driver import Rule
from cnncc.targets.llvm.schedule.generic import Generic
from cnncc.targets.llvm.schedule.interleave import Interleave
from cnncc.targets.llvm.schedule.loops import Loops
from cnncc.targets.llvm.schedule.matmul import Matmul
from cnncc.targets.llvm.schedule.normalize import Normalize
from cnncc.targets.llvm.schedule.packing import Packing
from cnncc.targets.llvm.schedule.window import SlidingWindow
from cnncc.targets.llvm.schedule.winograd import Winograd

RULES: tuple[Rule, ...] = (
    Conv2d(),
    IntegerConv2d(),
    Winograd(),
    SlidingWindow(),
    Matmul(),
    GatherChannels(),
    Interleave(),
    Normalize(),
    Packing(),
    Loops(),
    Generic(),
)
