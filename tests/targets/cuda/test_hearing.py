from __future__ import annotations

from cnncc.targets.cuda.hearing import Phases, monitor_of
from cnncc.targets.cuda.parse import readable
from cnncc_runtime.errors import BuildFailed
from tests.calibration.rtx import tensorrt_rtx


def test_a_phase_inside_another_is_part_of_its_current_step() -> None:
    phases = Phases()
    assert phases.fraction == 0
    phases.start("build", None, 4)
    phases.step("build", 0)
    assert phases.fraction == 1 / 4
    phases.start("tactics", "build", 2)
    phases.step("tactics", 0)
    assert phases.fraction == 1 / 4 + 1 / 8
    phases.start("one tactic", "tactics", 2)
    phases.step("one tactic", 0)
    assert phases.fraction == 1 / 4 + 1 / 8 + 1 / 16
    phases.finish("one tactic")
    phases.finish("tactics")
    for step in (1, 2, 3, 4):  # a step more than was announced
        phases.step("build", step)
    assert phases.fraction == 1
    phases.finish("build")
    phases.finish("build")
    phases.step("build", 1)


def test_a_phase_of_an_unknown_parent_stands_alone() -> None:
    phases = Phases()
    phases.start("inner", "gone", 0)
    phases.step("inner", 0)
    assert phases.fraction == 1


def test_conditions_of_the_parsers_source_are_left_out() -> None:
    assert readable("Assertion failed: a && b == C::kV3: the plugin was not found.") == "the plugin was not found"
    assert readable("Assertion failed: onlyCondition()") == "Assertion failed: onlyCondition()"
    assert readable("No importer registered for op: DFT.") == "No importer registered for op: DFT"


def test_a_budget_stops_the_build_at_its_next_step() -> None:
    monitor = monitor_of(tensorrt_rtx(), lambda _what, _fraction: None, 1e-9)
    monitor.phase_start("Building", None, 4)
    assert monitor.step_complete("Building", 0) is False
    assert isinstance(monitor.failure, BuildFailed)
    assert "did not finish within 1e-09 s (--build-budget)" in str(monitor.failure)
