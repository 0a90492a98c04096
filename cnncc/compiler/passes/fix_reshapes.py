"""A Reshape whose result is known but for one size gets a constant shape, with -1 for that size.

Exporters compute the shape at run time where the batch is symbolic (Shape, Gather, Concat); inference has already
found what it comes to, and engines build faster, safer code for a constant one.
"""

from __future__ import annotations

import numpy as np

from cnncc.graph.draft import STANDARD, Draft, GraphPass


def _fix_reshapes(draft: Draft) -> int:
    fixed = 0
    for node in draft.nodes:
        if node.op_type != "Reshape" or node.domain not in STANDARD or node.input[1] in draft.weights:
            continue
        target = _constant_shape(draft.shape(node.output[0]))
        if target is None:
            continue
        name = draft.fresh(f"{node.name}.shape")
        draft.set_constant(name, np.array(target, dtype=np.int64))
        node.input[1] = name
        kept = [entry for entry in node.attribute if entry.name != "allowzero"]  # there is no zero any more
        del node.attribute[:]
        node.attribute.extend(kept)
        fixed += 1
    return fixed


def _constant_shape(shape: tuple[int | str | None, ...] | None) -> list[int] | None:
    """Return the shape with -1 for its one open size; None where more are open, or a size of zero hides it."""
    if shape is None or 0 in shape:
        return None
    target = [size if isinstance(size, int) else -1 for size in shape]
    return target if target.count(-1) <= 1 else None


fix_reshapes = GraphPass("fix_reshapes", _fix_reshapes)
"""Give a Reshape a constant shape where inference knows all sizes but one."""
