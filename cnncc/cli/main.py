"""The command group: lazy commands, common flags, configuration, and the way from an exception to an exit code."""

from __future__ import annotations

import functools
import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

import cnncc
from cnncc.cli.signals import Terminated, stops_as_stops, unwind_on_signals
from cnncc_runtime.errors import CnnccError, DependencyMissing, EnvironmentMissing, Interrupted, UsageError

COMMANDS = {
    "compile": "Compile a model into verified engine bundles (the main job).",
    "train": "Train a model on labelled data.",
    "prune": "Take channels or weights out of a model, and fine-tune it.",
    "distil": "Train a small model by what a larger one makes of the data.",
    "shrink": "Prune, distil, quantize and measure, down to a budget.",
    "export": "Export a model to clean ONNX.",
    "calibrate": "Find a model's int8 scales on your data.",
    "quantize": "Write a model as int8 Q/DQ ONNX, by a calibration table.",
    "verify": "Check a bundle's engine against its model again.",
    "bench": "Benchmark a bundle against ONNX Runtime, PyTorch and others.",
    "run": "Run a bundle on an image or on arrays.",
    "publish": "Publish bundles as a release to a fleet's registry.",
    "fleet": "Say which release a fleet's devices take, and who may say so.",
    "inspect": "Show what is inside a bundle or a model.",
    "targets": "List targets, their state here, and device profiles.",
    "doctor": "Say what this machine can build and run, and how to get the rest.",
    "cache": "Show or clear the compile cache.",
}
"""Command → help line; each lives in ``cnncc.cli.NAME_command`` as ``command`` and is imported when called."""

EXIT_CODES = """\b
Exit codes:
  0    done
  1    a check failed (parity, budget)
  2    usage: a flag, an argument, or an output path that is taken
  3    this machine lacks something (target, package, disk space, a folder to write in)
  4    the model, its weights, the data or the bundle was refused
  5    the toolchain failed
  20   a registry could not be reached
  30   what a registry has is not to be believed
  130  interrupted; nothing half-written was left behind (143 when terminated)
"""

_EXTRAS = {
    **dict.fromkeys(("requests", "securesystemslib", "tuf", "zstandard"), "fleet"),
    **dict.fromkeys(("jinja2", "sqlalchemy", "starlette", "uvicorn"), "collector"),
}
"""Package → the extra that brings it, for commands that not every installation has."""

F = TypeVar("F", bound=Callable[..., Any])
_JSON = "cnncc.json"
RENDER = "cnncc.render"
"""Where a command's context keeps its `Render`."""


class LazyGroup(click.Group):
    """Imports a command when it is called, so that ``cnncc --help`` answers at once."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note whether JSON is wanted before anything can fail."""
        ctx.meta[_JSON] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what fails outside of it (configuration, flags, imports) is told as its own errors are."""
        from cnncc.cli.render import Render

        render = Render(as_json=ctx.meta[_JSON])
        try:
            with stops_as_stops():
                return super().invoke(ctx)
        except CnnccError as exc:
            render.error(exc)
            raise click.exceptions.Exit(exc.exit_code) from exc
        except click.UsageError as exc:
            render.document(UsageError(exc.format_message()))
            raise
        except KeyboardInterrupt as exc:
            what, code = ("terminated", 143) if isinstance(exc, Terminated) else ("interrupted", Interrupted.exit_code)
            render.error(Interrupted(f"{what}; nothing half-written was left behind"), code)
            raise click.exceptions.Exit(code) from exc

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"cnncc.cli.{cmd_name}_command")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help lines without importing the commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=EXIT_CODES,
)
@click.version_option(cnncc.__version__, prog_name="cnncc")
@click.pass_context
def cli(ctx: click.Context) -> None:
    r"""Compile trained CNNs into engines for edge and accelerator hardware, proven and measured.

    \b
    cnncc compile model.py:build --weights model.safetensors --input-shape 1,3,224,224 --target llvm
    cnncc verify model.cnncc
    cnncc bench model.cnncc --against ort,torch

    Defaults of any flag can stand in ./cnncc.toml: a table per command, `target = "llvm"` under [compile].
    """
    ctx.default_map = _configuration(Path("cnncc.toml"))


def _configuration(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise UsageError(f"{path} cannot be read: {exc}", hint="see `cnncc --help` for its form") from exc
    return {name: _defaults(path, name, table) for name, table in tables.items()}


def _defaults(path: Path, name: str, table: Any) -> dict[str, Any]:
    """Return a command's defaults by parameter; the keys of the table are its flags, with ``-`` or ``_``."""
    command = LazyGroup().get_command(click.Context(cli), name)
    if command is None or not isinstance(table, dict):
        raise UsageError(f"{path} has a table [{name}] that is no command", hint=f"commands: {', '.join(COMMANDS)}")
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    flags = {flag[2:].replace("-", "_"): option for option in options for flag in option.opts if flag.startswith("--")}
    given = {key.replace("-", "_"): value for key, value in table.items()}
    if unknown := sorted(set(given) - set(flags)):
        raise UsageError(
            f"{path}: [{name}] has unknown keys: {', '.join(unknown)}",
            hint=f"the flags of `cnncc {name} --help`: {', '.join(flags)}",
        )
    return {str(flags[key].name): _as_given(flags[key], value) for key, value in given.items()}


def _as_given(option: click.Option, value: Any) -> Any:
    """Return a TOML value as the command line would give it: a list repeats a flag, or is joined with commas."""
    if option.multiple:
        return [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return ",".join(map(str, value)) if isinstance(value, list) else value


def common(function: F) -> F:
    """Add the flags that every command has; the command receives a `Render` as its first argument."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout; messages go to stderr.")
    @click.option("-q", "--quiet", is_flag=True, help="Results and errors only.")
    @click.option("-v", "--verbose", is_flag=True, help="More detail, and tracebacks of failures.")
    @functools.wraps(function)
    def wrapper(*, as_json: bool, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        from cnncc.cli.render import Render

        render = Render(as_json=as_json, verbosity=-1 if quiet else int(verbose))
        click.get_current_context().meta[RENDER] = render
        try:
            with stops_as_stops():
                return function(render, **kwargs)
        except CnnccError as exc:
            _trace(render.verbosity)
            render.error(exc)
            raise click.exceptions.Exit(exc.exit_code) from exc
        except MemoryError as exc:
            render.error(
                EnvironmentMissing(
                    "the machine ran out of memory", hint="close other programs, or use a larger machine"
                )
            )
            raise click.exceptions.Exit(EnvironmentMissing.exit_code) from exc
        except (click.exceptions.ClickException, click.exceptions.Exit):
            raise
        except Exception as exc:
            error = _missing(exc)
            if error is None:
                _trace(1)
                error = CnnccError(
                    f"a bug in cnncc: {type(exc).__name__}: {exc}", hint="report it with the traceback above"
                )
            render.error(error)
            raise click.exceptions.Exit(error.exit_code) from exc
        finally:
            render.close()

    return wrapper  # type: ignore[return-value]  # click's decorators change the signature


def _missing(exc: Exception) -> CnnccError | None:
    """Return what to install where a package of an extra is missing; None for any other error."""
    package = (exc.name or "").partition(".")[0] if isinstance(exc, ModuleNotFoundError) else ""
    if package not in _EXTRAS:
        return None
    return DependencyMissing(f"this command needs {package}", hint=f"pip install 'cnncc[{_EXTRAS[package]}]'")


def _trace(verbosity: int) -> None:
    if verbosity > 0:
        traceback.print_exc()


def cache_option(function: F) -> F:
    """Add ``--cache-dir``."""
    return click.option(
        "--cache-dir",
        type=click.Path(file_okay=False, path_type=Path),
        help="Where stages are cached.  [default: $CNNCC_CACHE_DIR or the user's cache folder]",
    )(function)


def main() -> None:
    """Run the command line."""
    unwind_on_signals()
    cli(prog_name="cnncc")
