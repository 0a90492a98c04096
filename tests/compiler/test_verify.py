"""Verification: who is run, who is judged against what, and what a bundle can still prove."""

from __future__ import annotations

import contextlib
import io
import json
import weakref
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from cnncc.compiler.verify import (
    first_divergence,
    random_samples,
    read_report,
    verify_bundle,
    verify_engine,
    verify_layers,
)
from cnncc.graph.names import set_module_path
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from cnncc_runtime.bundle import (
    GOLDEN,
    PARITY,
    REFERENCE,
    SCHEMA,
    Bundle,
    EngineRecord,
    Manifest,
    TargetRecord,
    to_plain,
    write_bundle,
)
from cnncc_runtime.digests import canonical_json
from cnncc_runtime.errors import BundleRefused, DataRefused
from cnncc_runtime.golden import GoldenLimit, check_golden, golden_bytes, read_golden
from cnncc_runtime.specs import TensorSpec


def small_graph(scale: float = 1.0) -> OnnxGraph:
    """Two convolutions and a classifier: 1×3×8×8 → 1×10."""
    generator = np.random.default_rng(1)
    weights = {
        "w1": generator.standard_normal((8, 3, 3, 3)) / 5,
        "w2": generator.standard_normal((16, 8, 3, 3)) / 8 * scale,
        "w3": generator.standard_normal((10, 16)) / 4,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["g"], name="pool"),
        helper.make_node("Flatten", ["g"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3"], ["y"], name="fc", transB=1),
    ]
    for node, path in zip(nodes, ("a", "a", "b", "b", "", "", "head"), strict=True):
        set_module_path(node, path)
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])],
            [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    return OnnxGraph(onnx.shape_inference.infer_shapes(proto))


def double(graph: OnnxGraph):
    """A stand-in for the truth: ONNX's own reference evaluator, on a copy of the graph cast to float64."""
    proto = graph.copy_proto()
    tensors = [
        numpy_helper.from_array(numpy_helper.to_array(t).astype(np.float64), t.name) for t in graph.constants.values()
    ]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(tensors)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    del proto.graph.value_info[:]
    evaluator = ReferenceEvaluator(proto)
    names = [value.name for value in proto.graph.output]

    def run(feeds):
        values = evaluator.run(None, {name: array.astype(np.float64) for name, array in feeds.items()})
        return dict(zip(names, values, strict=True))

    return run


def verify(graph, engine, **changes):
    feeds, names = random_samples(graph.inputs)
    given = {"exported": graph, "cleaned": graph, "torch_run": None, "truth": double} | changes
    return verify_engine(engine_run=engine, samples=feeds, sample_names=names, **given)


@pytest.fixture(scope="module")
def graph():
    return small_graph()


class TestSamples:
    def test_are_seeded(self):
        specs = (TensorSpec("x", (2, 3)), TensorSpec("n", (4,), "int64"), TensorSpec("b", (), "bool"))
        (first, _), (again, _), (other, _) = (random_samples(specs, seed=seed) for seed in (0, 0, 1))
        assert all(np.array_equal(a[k], b[k]) for a, b in zip(first, again, strict=True) for k in a)
        assert not np.array_equal(first[0]["x"], other[0]["x"])
        assert not np.array_equal(first[0]["x"], first[1]["x"])
        assert [(v.dtype.name, v.shape) for v in first[0].values()] == [
            ("float32", (2, 3)),
            ("int64", (4,)),
            ("bool", ()),
        ]

    def test_cover_every_batch_size(self):
        feeds, names = random_samples((TensorSpec("x", ("N", 3)),), batches=(1, 4, 8))
        assert [len(f["x"]) for f in feeds] == [1, 1, 4, 8]
        assert names == ["random-1 (batch 1)", "random-2 (batch 1)", "random-3 (batch 4)", "random-4 (batch 8)"]


class TestEngine:
    def test_a_right_engine_passes_and_everyone_is_measured(self, graph):
        run = Reference(graph).run
        found = verify(graph, run, torch_run=run, cleaned=small_graph())
        assert found.report.passed, found.report.failures
        measured = [(s.subject, s.against, s.judged) for s in found.report.subjects]
        assert measured == [
            ("onnxruntime", "truth", True),
            ("pytorch", "truth", True),
            ("cleaned", "truth", True),
            ("engine", "truth", True),
            ("engine", "pytorch", False),
            ("engine", "onnxruntime", False),
        ]
        assert found.report.subject("engine").outputs[0].top1_agreement == 1.0

    @pytest.mark.parametrize(
        ("wrong", "note"),
        [
            ("torch_run", "the export changed the model"),
            ("cleaned", "a graph pass changed the model"),
            ("engine", "the target built it wrong"),
        ],
    )
    def test_a_wrong_stage_is_named(self, graph, wrong, note):
        right, bad = Reference(graph).run, Reference(small_graph(1.0001)).run
        changes = {
            "torch_run": bad if wrong == "torch_run" else right,
            "cleaned": small_graph(1.0001 if wrong == "cleaned" else 1.0),
        }
        report = verify(graph, bad if wrong != "torch_run" else right, **changes).report
        assert not report.passed
        assert report.notes == tuple(n for n in report.notes if note in n) != ()

    def test_an_output_that_an_engine_lacks_is_named(self, graph):
        report = verify(graph, lambda _feeds: {}).report
        assert "output 'y' is missing" in report.failures[0]

    def test_an_engine_of_another_machine_is_not_run(self, graph):
        found = verify(graph, None)
        assert found.report.passed
        assert found.report.subject("engine") is None
        assert "not run" in found.report.notes[0]
        assert found.golden

    def test_needs_samples(self, graph):
        with pytest.raises(DataRefused):
            verify_engine(
                exported=graph,
                cleaned=graph,
                torch_run=None,
                engine_run=None,
                samples=[],
                sample_names=[],
                truth=double,
            )

    def test_holds_one_executor_at_a_time(self, graph, monkeypatch):
        """Each holds the weights, and the truth holds them twice over."""
        alive: list[weakref.ref] = []

        def alone():
            return all(reference() is None for reference in alive)

        class Truth:
            def __init__(self, graph):
                assert alone()
                self._run = double(graph)
                self._cycle = self  # as onnx's evaluator has
                alive.append(weakref.ref(self))

            def run(self, feeds):
                return self._run(feeds)

        class Watched(Reference):
            def __init__(self, graph):
                assert alone()
                super().__init__(graph)
                alive.append(weakref.ref(self))

        def engine(feeds):
            assert alone()
            return Reference(graph).run(feeds)

        monkeypatch.setattr("cnncc.graph.reference.Reference", Watched)
        feeds, names = random_samples(graph.inputs)
        verify_engine(
            exported=small_graph,
            cleaned=lambda: small_graph(),
            torch_run=None,
            engine_run=engine,
            samples=feeds,
            sample_names=names,
            truth=lambda graph: Truth(graph).run,
        )
        assert len(alive) == 3


class Session:
    """An open engine of a graph."""

    def __init__(self, graph):
        self._run = Reference(graph).run

    def run(self, feeds):
        return self._run(feeds)


def make_bundle(folder: Path, graph: OnnxGraph, *, drop: str = "") -> Bundle:
    found = verify(graph, Reference(graph).run)
    manifest = Manifest(
        schema=SCHEMA,
        name="small",
        model={},
        target=TargetRecord("llvm", "host", "", "", "x86_64", ()),
        engine=EngineRecord("engine.so", "tvm-vm", "1", {0: "main"}),
        inputs=graph.inputs,
        outputs=graph.outputs,
        batches=(),
        preprocessing=None,
        labels=(),
        precision="fp32",
        layers=(),
        parity="passed",
        toolchain={},
        reproducible=True,
        files={},
    )
    files = {
        "engine.so": ("engine", b"x"),
        GOLDEN: ("golden", found.golden),
        REFERENCE: ("reference", graph.serialized),
        PARITY: ("report", canonical_json(to_plain(found.report))),
    }
    folder.mkdir()
    return write_bundle(folder, manifest, {name: file for name, file in files.items() if name not in drop.split()})


class TestBundle:
    def check(self, bundle, engine, **options):
        return verify_bundle(
            bundle, open_session=lambda _path: contextlib.nullcontext(Session(engine)), truth=double, **options
        )

    def test_is_verified_against_its_own_graph_and_golden_sample(self, tmp_path, graph):
        bundle = make_bundle(tmp_path / "a.cnncc", graph)
        report = self.check(bundle, graph)
        assert report.passed
        assert report.subject("engine", "golden").judged
        assert not self.check(bundle, small_graph(1.0001)).passed

    def test_that_was_stripped_is_checked_by_its_golden_sample_alone_and_says_so(self, tmp_path, graph):
        bundle = make_bundle(tmp_path / "a.cnncc", graph, drop=REFERENCE)
        report = self.check(bundle, graph)
        assert report.passed
        assert "only the golden sample" in report.notes[0]
        assert not self.check(bundle, small_graph(1.0001)).passed

    def test_with_nothing_to_compare_to_is_refused(self, tmp_path, graph):
        bundle = make_bundle(tmp_path / "a.cnncc", graph, drop=f"{REFERENCE} {GOLDEN}")
        with pytest.raises(BundleRefused, match="neither"):
            self.check(bundle, graph)

    def test_damage_is_refused(self, tmp_path, graph):
        bundle = make_bundle(tmp_path / "a.cnncc", graph)
        path = bundle.path / GOLDEN
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        with pytest.raises(BundleRefused, match="changed after it was built"):
            self.check(bundle, graph)

    def test_layers_are_compared_on_demand(self, tmp_path, graph):
        bundle = make_bundle(tmp_path / "a.cnncc", graph)
        report = self.check(bundle, small_graph(1.0001), layers=lambda part: Reference(rescaled(part)).run)
        assert [layer.tensor for layer in report.layers] == ["c1", "r1", "c2", "r2", "g", "f", "y"]
        assert "first leaves its tolerance at b (Conv 'conv2')" in report.notes[0]

    def test_report_is_read_back(self, tmp_path, graph):
        assert read_report(make_bundle(tmp_path / "a.cnncc", graph)).passed
        assert read_report(make_bundle(tmp_path / "b.cnncc", graph, drop=PARITY)) is None


def rescaled(graph: OnnxGraph) -> OnnxGraph:
    """The graph with its second convolution wrong."""
    proto = graph.copy_proto()
    for tensor in proto.graph.initializer:
        if tensor.name == "w2":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.0001), "w2"))
    return OnnxGraph(proto)


class TestLayers:
    def test_names_the_first_module_that_is_wrong(self, graph):
        feeds = random_samples(graph.inputs)[0][0]
        layers = verify_layers(graph, lambda part: Reference(rescaled(part)).run, feeds, truth=double)
        first = first_divergence(layers)
        assert (first.module, first.op, first.tensor) == ("b", "Conv", "c2")
        assert [layer.within for layer in layers] == [True, True, False, False, False, False, False]
        assert first.rel_l2 == pytest.approx(1e-4, rel=0.1)
        assert first.sqnr_db == pytest.approx(80, abs=1)

    def test_finds_nothing_in_a_right_engine(self, graph):
        feeds = random_samples(graph.inputs)[0][0]
        layers = verify_layers(graph, lambda part: Reference(part).run, feeds, truth=double)
        assert len(layers) == 7
        assert first_divergence(layers) is None

    def test_chunks_give_the_same_answer(self, graph, monkeypatch):
        feeds = random_samples(graph.inputs)[0][0]
        built = []

        def build(part):
            built.append([spec.name for spec in part.outputs])
            return Reference(part).run

        whole = verify_layers(graph, build, feeds, truth=double)
        monkeypatch.setattr("cnncc.compiler.verify._LAYER_CHUNK", 2 * 8 * 8 * 8 * 8)
        assert verify_layers(graph, build, feeds, truth=double) == whole
        assert [len(names) for names in built] == [7, 2, 1, 1, 3]


FEEDS = {"x": np.arange(6, dtype=np.float32).reshape(1, 6), "a/b:0": np.array(3, np.int64)}
OUTPUTS = {"y": np.linspace(-1, 1, 5, dtype=np.float32), "n": np.array([1, 2]), "z": np.zeros((0, 2), np.float32)}
LIMITS = {"y": GoldenLimit(1e-6, 1e-6), "z": GoldenLimit(None, 0.0)}


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


HOSTILE = {
    "a pickle": {"feed.0.npy": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"c")},
    "a size that would fill memory": {
        "feed.0.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,), }", b"1234")
    },
    "negative sizes": {"feed.0.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1), }", b"1234")},
    "another byte order": {"feed.0.npy": npy("{'descr': '>f4', 'fortran_order': False, 'shape': (1,), }", b"1234")},
    "a header that is code": {"feed.0.npy": npy("__import__('os').abort()", b"1234")},
    "no array": {"feed.0.npy": b"hello"},
    "another npy version": {"feed.0.npy": npy("{}", version=b"\x09\x00")},
    "a missing member": {"output.1.npy": None},
    "a surplus member": {"../../etc/passwd": b""},
    "no index": {"golden.json": None},
    "an index that is no JSON": {"golden.json": b"\xff{"},
    "an index of another schema": {
        "golden.json": json.dumps({"schema": "x", "feeds": [], "outputs": [], "limits": {}}).encode()
    },
    "a name twice": {
        "golden.json": json.dumps(
            {"schema": "cnncc.golden/1", "feeds": ["x", "x"], "outputs": ["y", "n", "z"], "limits": {}}
        ).encode()
    },
}


class TestGolden:
    def write(self, path, data=None):
        path.write_bytes(golden_bytes(FEEDS, OUTPUTS, LIMITS) if data is None else data)
        return path

    def test_is_read_back_as_written(self, tmp_path):
        golden = read_golden(self.write(tmp_path / GOLDEN))
        for found, wanted in ((golden.feeds, FEEDS), (golden.outputs, OUTPUTS)):
            assert list(found) == list(wanted)
            for name, array in wanted.items():
                assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
                assert np.array_equal(found[name], array)
        assert golden.limits == LIMITS

    def test_bytes_depend_on_content_alone(self):
        first = golden_bytes(FEEDS, OUTPUTS, LIMITS)
        assert golden_bytes(FEEDS, OUTPUTS, LIMITS) == first
        with zipfile.ZipFile(io.BytesIO(first)) as archive:
            members = {(m.date_time, m.create_system, m.external_attr, m.compress_type) for m in archive.infolist()}
        assert members == {((1980, 1, 1, 0, 0, 0), 3, 0o644 << 16, zipfile.ZIP_STORED)}
        fortran = {"x": np.asfortranarray(np.ones((2, 3), np.float32))}
        assert golden_bytes(fortran, {}, {}) == golden_bytes({"x": np.ones((2, 3), np.float32)}, {}, {})

    def test_is_an_ordinary_npz(self, tmp_path):
        with np.load(self.write(tmp_path / GOLDEN), allow_pickle=False) as arrays:
            assert np.array_equal(arrays["output.0"], OUTPUTS["y"])

    @pytest.mark.parametrize("keep", [0, 10, 0.3, 0.6, 0.99, -1])
    def test_truncated_is_refused(self, tmp_path, keep):
        data = golden_bytes(FEEDS, OUTPUTS, LIMITS)
        cut = data[:keep] if isinstance(keep, int) else data[: int(len(data) * keep)]
        with pytest.raises(BundleRefused, match="golden data"):
            read_golden(self.write(tmp_path / GOLDEN, cut))

    def rewritten(self, changes, compression=zipfile.ZIP_STORED):
        """The archive with members replaced (bytes), removed (None) or added."""
        source = zipfile.ZipFile(io.BytesIO(golden_bytes(FEEDS, OUTPUTS, LIMITS)))
        members = {name: source.read(name) for name in source.namelist()} | changes
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as archive:
            for name, content in members.items():
                if content is not None:
                    archive.writestr(name, content)
        return buffer.getvalue()

    @pytest.mark.parametrize("case", HOSTILE)
    def test_hostile_is_refused(self, tmp_path, case):
        data = self.rewritten(HOSTILE[case])
        with pytest.raises(BundleRefused, match="golden data"):
            read_golden(self.write(tmp_path / GOLDEN, data))

    def test_compressed_is_refused(self, tmp_path):
        data = self.rewritten({}, zipfile.ZIP_DEFLATED)
        with pytest.raises(BundleRefused, match="compressed"):
            read_golden(self.write(tmp_path / GOLDEN, data))

    def test_missing_is_refused(self, tmp_path):
        with pytest.raises(BundleRefused):
            read_golden(tmp_path / GOLDEN)

    def test_check_accepts_the_allowed_error_and_names_what_exceeds_it(self, tmp_path):
        golden = read_golden(self.write(tmp_path / GOLDEN))

        class Engine:
            def __init__(self, **changes):
                self.outputs = OUTPUTS | changes

            def run(self, feeds):
                assert list(feeds) == list(FEEDS)
                return {name: array for name, array in self.outputs.items() if array is not None}

        y = OUTPUTS["y"]
        assert check_golden(Engine(), golden) == ()
        assert check_golden(Engine(y=y * np.float32(1 + 2e-7)), golden) == ()
        for changes, sentence in (
            ({"y": y * np.float32(1.00001)}, "off by 1.0e-05 relative L2"),
            ({"y": np.where(y == 0, np.float32(np.nan), y)}, "NaN or Inf"),
            ({"y": y.astype(np.float64)}, "is float64"),
            ({"y": y[:4]}, "float32[4], not float32[5]"),
            ({"y": None}, "is missing"),
            ({"n": np.array([1, 3])}, "differs"),
        ):
            failures = check_golden(Engine(**changes), golden)
            assert len(failures) == 1
            assert sentence in failures[0]
