"""The Q/DQ lint: what TensorRT, TensorRT-RTX and TVM refuse or silently compute in float, told before any compile.

The contract it checks, every rule with its source, and what was measured are in ``docs/qdq.md``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import onnx

from cnncc.calibration.lint_rules import floating, refused, slow
from cnncc.calibration.lint_rules.rule import Rule, Severity
from cnncc.calibration.lint_rules.view import View
from cnncc.graph.names import module_path, node_label
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.errors import UnsupportedGraph

RULES: tuple[Rule, ...] = (*refused.RULES, *floating.RULES, *slow.RULES)
"""Every rule, the gravest first."""


@dataclass(frozen=True)
class Finding:
    """One place where a graph departs from the Q/DQ contract.

    Attributes:
        rule: Stable id of the rule.
        severity: ``refused``, ``float`` or ``slow``.
        targets: Those that the severity holds for: ``tensorrt``, ``tensorrt-rtx``, ``llvm``.
        module: PyTorch module path; for a Q or DQ, that of the layer that reads it.
        node: ONNX node name.
        op: ONNX operator.
        message: What is wrong, in one sentence.
        hint: What to do next.
    """

    rule: str
    severity: Severity
    targets: tuple[str, ...]
    module: str
    node: str
    op: str
    message: str
    hint: str

    def __str__(self) -> str:
        """Return ``module (Op 'node'): message [rule]``."""
        return f"{self.module} ({self.op} '{self.node}'): {self.message} [{self.rule}]"


def lint(graph: OnnxGraph, *, floats: Collection[str] = ()) -> tuple[Finding, ...]:
    """List every place where a graph departs from the Q/DQ contract; pure, and compiles nothing.

    A graph without Q/DQ has nothing to find. Nested graphs are not entered: the targets refuse control flow.

    Args:
        graph: Shapes help: where they are not known, rules about axes and channels stay silent.
        floats: Nodes, or modules with all that is in them, which stay in float on purpose: no ``float`` finding
            about them is made.

    Returns:
        Findings, the gravest rules first, and in the graph's order within a rule.
    """
    view = View(graph)
    return tuple(
        _finding(rule, node, message, view)
        for rule in RULES
        for node, message in rule.check(view)
        if rule.severity != "float" or not _named(node, view, floats)
    )


def require_clean(findings: Iterable[Finding], *, also: Collection[Severity] = ()) -> None:
    """Raise where a target would refuse or miscompute the graph.

    Args:
        findings: Of `lint`.
        also: Severities that are not tolerated either.

    Raises:
        UnsupportedGraph: Lists every such finding, by module.
    """
    bad = [finding for finding in findings if finding.severity == "refused" or finding.severity in also]
    if not bad:
        return
    hints = dict.fromkeys(finding.hint for finding in bad)
    places = "1 place" if len(bad) == 1 else f"{len(bad)} places"
    raise UnsupportedGraph(
        f"the graph's quantization departs in {places} from what targets compute",
        where=[str(finding) for finding in sorted(bad, key=lambda finding: finding.module)],
        hint="; ".join(hints),
    )


def _finding(rule: Rule, node: onnx.NodeProto, message: str, view: View) -> Finding:
    module = module_path(view.anchor(node))
    return Finding(rule.name, rule.severity, rule.targets, module, node_label(node), node.op_type, message, rule.hint)


def _named(node: onnx.NodeProto, view: View, names: Collection[str]) -> bool:
    module = module_path(view.anchor(node))
    known = {node_label(node), node_label(view.anchor(node)), module}
    return any(name in known or module.startswith(f"{name}.") for name in names)
