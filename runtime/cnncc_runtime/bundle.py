"""The bundle: a folder ``NAME.cnncc`` that holds an engine and all that is needed to trust and run it.

``manifest.json`` lists every file with its size and digest, so that fit and integrity are judged before anything
is loaded. Reading is strict: an unknown schema, a surplus or missing field, a path that leaves the folder, a link,
or a digest that does not match is refused.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import msgspec

from cnncc_runtime.digests import canonical_json, digest_bytes, digest_file, digest_stream
from cnncc_runtime.errors import BundleRefused, DataRefused
from cnncc_runtime.files import storage_errors
from cnncc_runtime.preprocess import Preprocessing
from cnncc_runtime.specs import DTYPES, TensorSpec
from cnncc_runtime.weights import WeightsRecord

SCHEMA = "cnncc.bundle/5"
MANIFEST = "manifest.json"
GOLDEN = "golden.npz"
PARITY = "parity.json"
BENCHMARK = "benchmark.json"
CALIBRATION = "calibration.json"
"""The calibration table of an int8 model."""
MEMORY = "memory.json"
"""Bytes that an executable takes, by kind: ``arena`` (written), ``weights`` (only read), ``code``."""
REFERENCE = "reference.onnx"
"""The cleaned ONNX model, for `verify` and `bench`; a device does not need it."""

RUNNER = "cnncc-run"
"""The program that runs the bundle where there is no Python; see `RUNTIME`."""
RUNTIME_LIBRARY = "libtvm_runtime.so"
"""TVM's runtime for it."""
RUNTIME = "runtime"
"""Role of both, in a bundle that carries them: they are for the engine's machine."""

AOT_STATIC = "aot-static"
"""Format of engines that are executables: see `cnncc_runtime.aot_session`."""

PARITIES = ("passed", "failed", "pending")

_MAX_MANIFEST = 16 << 20
_MAX_RANK = 32  # NumPy 1's bound


@dataclass(frozen=True)
class TargetRecord:
    """What an engine was built for; a device compares it with itself before it loads anything.

    Attributes:
        name: Target (``llvm``, ``cuda``).
        device: Profile name.
        triple: LLVM target triple; empty for GPUs.
        cpu: LLVM CPU name; empty for GPUs.
        machine: ELF machine name (``x86_64``, ``aarch64``); for GPUs that of the computer they are in.
        features: ISA features that the engine may execute, as `cnncc_runtime.cpu` names them.
        gpu: CUDA compute capability (``8.9``), with a ``+`` where newer GPUs run it too (``8.0+``); empty for CPUs.
    """

    name: str
    device: str
    triple: str
    cpu: str
    machine: str
    features: tuple[str, ...]
    gpu: str = ""

    @property
    def processor(self) -> str:
        """What executes the engine: the CPU by LLVM's name, or a GPU's architecture as ``sm89`` or ``sm80+``."""
        return f"sm{self.gpu.replace('.', '')}" if self.gpu else self.cpu


@dataclass(frozen=True)
class EngineRecord:
    """The engine file, and the file of weights where they are apart from it.

    Attributes:
        file: Its name in the bundle, exactly as the vendor's tools expect it.
        format: Which session opens it (``tvm-vm``, ``aot-static``, ``tensorrt``, ``tensorrt-rtx``).
        abi: Version of the runtime interface it needs; with a ``+`` where newer ones of its major version run it too
            (``tensorrt 10.16.1.11+``).
        entries: Batch size → function; a model without a batch dimension has one entry, ``0``.
        weights: What the functions take after their inputs; None where the engine file holds all weights.
        refit: The file of weights that a stripped engine is given when it is loaded: a npz of at least those that its
            refitter asks for, by the names that it asks for, types that NumPy lacks as unsigned integers of the same
            bits. Empty where the engine file holds all weights.
        dla: The deep learning accelerator that runs it; None for none.
    """

    file: str
    format: str
    abi: str
    entries: dict[int, str]
    weights: WeightsRecord | None = None
    refit: str = ""
    dla: int | None = None

    @property
    def roles(self) -> dict[str, str]:
        """Names of the files that make up the engine → their roles in the bundle."""
        weights = [self.weights.file] if self.weights else []
        return {self.file: "engine"} | dict.fromkeys([*weights, *filter(None, [self.refit])], "weights")


@dataclass(frozen=True)
class LayerRecord:
    """One kernel of the engine.

    Attributes:
        kernel: Name in the engine (a TVM PrimFunc).
        modules: PyTorch modules it computes.
        nodes: ONNX nodes it computes.
        ops: ONNX operators it computes.
        precision: Executed element type.
        schedule: Rule that scheduled it, or ``unscheduled``.
    """

    kernel: str
    modules: tuple[str, ...]
    nodes: tuple[str, ...]
    ops: tuple[str, ...]
    precision: str
    schedule: str


@dataclass(frozen=True)
class FileRecord:
    """A file of the bundle.

    Attributes:
        sha256: ``sha256:<hex>``.
        size: Bytes.
        role: ``engine``, ``weights``, ``golden``, ``report``, ``reference``, ``library``, which apps are linked with,
            or ``runtime``, which runs the engine without Python; devices need the first three.
    """

    sha256: str
    size: int
    role: str


@dataclass(frozen=True)
class Manifest:
    """All that is known of a bundle without opening its files.

    Attributes:
        schema: `SCHEMA`.
        name: The model's name.
        model: Where it came from: ``source`` (the MODEL argument) and digests of the model and its ONNX graph.
        target: What the engine was built for.
        engine: The engine file.
        inputs: Specs; the batch dimension is ``"N"`` where several batch sizes were built.
        outputs: Specs.
        batches: Batch sizes built; empty when the model has no symbolic batch.
        preprocessing: How images become inputs; None when not given.
        labels: Class names by output index; empty when not given.
        precision: What was asked for.
        layers: Executed precision and kernel per layer.
        parity: ``passed``, ``failed`` (kept by ``--keep-failed``) or ``pending``.
        toolchain: Name → version of everything that made the bundle.
        reproducible: Whether the same inputs and toolchain give the same bytes.
        files: Name → record of every other file.
    """

    schema: str
    name: str
    model: dict[str, str]
    target: TargetRecord
    engine: EngineRecord
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batches: tuple[int, ...]
    preprocessing: Preprocessing | None
    labels: tuple[str, ...]
    precision: str
    layers: tuple[LayerRecord, ...]
    parity: str
    toolchain: dict[str, str]
    reproducible: bool
    files: dict[str, FileRecord]

    def to_bytes(self) -> bytes:
        """Return canonical JSON; whole numbers in fractional fields are written as fractions."""
        plain = msgspec.to_builtins(self, str_keys=True)
        return canonical_json(to_plain(msgspec.convert(plain, Manifest, str_keys=True)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Decode and check a manifest.

        Raises:
            BundleRefused: Not canonical JSON, wrong schema, wrong types, surplus or missing fields, unsafe names.
        """
        fix = "build the bundle again with this cnncc, or read it with the cnncc that wrote it"
        try:
            head = msgspec.json.decode(data, type=_SchemaOnly)
            if head.schema != SCHEMA:
                raise BundleRefused(f"the manifest's schema is '{head.schema}', this cnncc reads '{SCHEMA}'", hint=fix)
            manifest = msgspec.json.decode(data, type=cls)
            canonical = manifest.to_bytes()
        except (msgspec.MsgspecError, ValueError, RecursionError, DataRefused) as exc:
            raise BundleRefused(f"the manifest is not valid: {exc}", hint=fix) from exc
        if canonical != data:  # a field that is not ours, one that is there twice, or another spelling
            raise BundleRefused("the manifest is not what cnncc writes: surplus or repeated fields", hint=fix)
        if problem := manifest._problem():
            raise BundleRefused(f"the manifest is not valid: {problem}", hint=fix)
        return manifest

    def _problem(self) -> str:
        """Return what contradicts itself or is unsafe; empty when all is well."""
        bad_files = [name for name, record in self.files.items() if not _is_safe(name) or not _is_file_record(record)]
        bad_specs = [str(spec) for spec in (*self.inputs, *self.outputs) if not _is_spec(spec)]
        entries = sorted(self.engine.entries)
        absent = self.engine.roles.keys() - self.files.keys()
        weights = "" if absent else self._problem_of_weights()
        problems = {
            f"the files {bad_files!r}": not bad_files,
            f"the engine {list(self.engine.roles)}, which is not among the files": not absent,
            f"the tensors {bad_specs!r}": not bad_specs,
            "inputs of the same name": len({spec.name for spec in self.inputs}) == len(self.inputs),
            "outputs of the same name": len({spec.name for spec in self.outputs}) == len(self.outputs),
            f"entries {entries} for the batch sizes {list(self.batches)}": entries == (sorted(self.batches) or [0]),
            f"the parity '{self.parity}'": self.parity in PARITIES,
            f"the engine '{self.engine.file}', which is its weights too": (
                self.engine.roles.get(self.engine.file) == "engine"
            ),
            f"the GPU '{self.target.gpu}'": re.fullmatch(r"(\d+\.\d+\+?)?", self.target.gpu) is not None,
            weights: not weights,
        }
        return "; ".join(problem for problem, good in problems.items() if not good)

    def _problem_of_weights(self) -> str:
        weights = self.engine.weights
        return weights.problem(self.files[weights.file].size, self.engine.entries) if weights else ""

    @property
    def engine_bytes(self) -> int:
        """Bytes of the engine with its weights."""
        return sum(self.files[name].size for name in self.engine.roles)


def _is_safe(name: str) -> bool:
    pure = PurePosixPath(name)
    plain = name == pure.as_posix() and not pure.is_absolute() and not {".", ".."} & {name, *pure.parts}
    return plain and name != MANIFEST and "\\" not in name and name.isprintable()


def _is_file_record(record: FileRecord) -> bool:
    return record.size >= 0 and re.fullmatch(r"sha256:[0-9a-f]{64}", record.sha256) is not None


def _is_spec(spec: TensorSpec) -> bool:
    sizes = [size for size in spec.shape if isinstance(size, int)]
    return spec.dtype in DTYPES and len(spec.shape) <= _MAX_RANK and all(0 <= size < 1 << 40 for size in sizes)


@dataclass(frozen=True)
class _SchemaOnly:
    schema: str


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest was read; `verify_file` before you use a file.

    Attributes:
        path: Its folder.
        manifest: What it says of itself.
        digest: Digest of the manifest, and so of everything.
    """

    path: Path
    manifest: Manifest
    digest: str

    def file(self, name: str) -> Path:
        """Return the path of a listed file after checking that its size and digest match.

        Raises:
            BundleRefused: Not listed, missing, a link, or changed.
        """
        with self.open(name):
            return self.path / name

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open a listed file whose size and digest match; a later change of its name does not matter.

        Raises:
            BundleRefused: Not listed, missing, a link, or changed.
        """
        record = self.manifest.files.get(name)
        if record is None:
            raise self._refuse(name, "is not in the bundle")
        try:
            handle = self._open(name)
        except (OSError, RuntimeError) as exc:  # RuntimeError: Python < 3.13 on a loop of links
            raise self._refuse(name, f"cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
        with handle as file:
            try:
                size = os.fstat(file.fileno()).st_size
                found = digest_stream(file) if size == record.size else ""
            except OSError as exc:
                raise self._refuse(name, f"cannot be read: {exc.strerror}") from exc
            if size != record.size:
                raise self._refuse(name, f"has {size} bytes, the manifest says {record.size}")
            if found != record.sha256:
                raise self._refuse(name, "was changed after it was built")
            file.seek(0)
            yield file

    def _open(self, name: str) -> BinaryIO:
        path = self.path / name
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise self._refuse(name, "is not a plain file of the bundle")
        handle = _open_plain(path)
        if handle is None:
            raise self._refuse(name, "is not a plain file of the bundle")
        return handle

    def _refuse(self, name: str, why: str) -> BundleRefused:
        return BundleRefused(
            f"'{name}' {why}", where=[str(self.path / name)], hint="copy the bundle again, or build it again"
        )

    def has(self, name: str) -> bool:
        """Whether the manifest lists a file."""
        return name in self.manifest.files


def _open_plain(path: Path) -> BinaryIO | None:
    """Open a file; None where it is a link, a folder or a device.

    Raises:
        OSError: It cannot be opened.
    """
    if path.is_symlink():
        return None
    # O_NOFOLLOW: it may have become a link since; O_NONBLOCK: a pipe in a file's place must not hang the reader
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        return None
    return os.fdopen(handle, "rb")


def read_bundle(path: Path) -> Bundle:
    """Read a bundle's manifest; files are checked when they are asked for.

    Raises:
        BundleRefused: Missing, not a bundle, damaged or hostile.
    """
    manifest = path / MANIFEST
    hint = "give a NAME.cnncc folder that `cnncc compile` made"
    try:
        if not path.is_dir():
            raise BundleRefused(f"{path} is not a bundle folder", hint=hint)
        file = _open_plain(manifest)
        if file is None:
            raise BundleRefused(f"the {MANIFEST} of {path} is not a plain file", hint=hint)
        with file:
            data = file.read(_MAX_MANIFEST + 1)
    except FileNotFoundError as exc:
        raise BundleRefused(f"{path} holds no {MANIFEST}", hint=hint) from exc
    except OSError as exc:
        raise BundleRefused(f"{path} cannot be read: {exc.strerror}", hint=hint) from exc
    if len(data) > _MAX_MANIFEST:
        raise BundleRefused(f"{manifest} is larger than {_MAX_MANIFEST >> 20} MiB", hint=hint)
    try:
        return Bundle(path, Manifest.from_bytes(data), digest_bytes(data))
    except BundleRefused as exc:
        raise BundleRefused(exc.message, where=[str(manifest)], hint=exc.hint) from exc


def write_bundle(folder: Path, manifest: Manifest, files: Mapping[str, tuple[str, Path | bytes]]) -> Bundle:
    """Fill an empty folder (see `cnncc_runtime.files.atomic_folder`) with a bundle.

    Args:
        folder: An existing, empty folder.
        manifest: Its ``files`` are replaced by what is written.
        files: Name → (role, content or a file to copy).

    Raises:
        StorageFailed: The folder cannot be written.
        BundleRefused: The manifest contradicts itself: no reader would take it.
    """
    records: dict[str, FileRecord] = {}
    with storage_errors(folder):
        for name, (role, content) in sorted(files.items()):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                shutil.copyfile(content, path)
            records[name] = FileRecord(digest_file(path), path.stat().st_size, role)
        data = replace(manifest, files=records).to_bytes()
        complete = Manifest.from_bytes(data)
        (folder / MANIFEST).write_bytes(data)
        make_executable(folder, complete)
    return Bundle(folder, complete, digest_bytes(data))


def make_executable(folder: Path, manifest: Manifest) -> None:
    """Let a bundle's programs be run by their names; sessions need no such right.

    Args:
        folder: The bundle's.
        manifest: Its manifest.
    """
    programs = [name for name, record in manifest.files.items() if (name, record.role) == (RUNNER, RUNTIME)]
    programs += [manifest.engine.file] if manifest.engine.format == AOT_STATIC else []
    for name in programs:
        (folder / name).chmod(0o755)


def to_plain(record: Any) -> Any:
    """Return a record (nested frozen dataclasses) as plain data for JSON."""
    return msgspec.to_builtins(record, str_keys=True)
