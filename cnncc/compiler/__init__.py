"""From a trained model to a verified engine: ingest, export, graph passes, pipeline, parity, benchmarks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnncc.compiler.pipeline import compile

__all__ = ["compile"]


def __getattr__(name: str) -> Any:
    """Import the pipeline when it is first asked for: a light import stays light."""
    if name == "compile":
        from cnncc.compiler.pipeline import compile

        return compile
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
