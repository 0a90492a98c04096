"""The table of peers, and what naming them wrongly says."""

from __future__ import annotations

from pathlib import Path

import pytest

from cnncc.compiler.bench import subjects, trtexec
from cnncc.compiler.bench.subjects import KINDS, Kind, Subject, check_device, find_kind, make_subjects, peers
from cnncc_runtime.errors import DependencyMissing, UsageError


def test_every_adapter_exists_and_has_the_whole_interface():
    import importlib

    for kind in KINDS.values():
        module, _, name = kind.adapter.partition(":")
        adapter = getattr(importlib.import_module(module), name)(kind.options)
        for member in ("load", "open", "bind", "run", "outputs"):
            assert callable(getattr(adapter, member)), (kind.name, member)


def test_an_unknown_peer_lists_the_known_ones():
    with pytest.raises(UsageError, match="'orc' is not a known peer") as caught:
        find_kind("orc")
    assert all(name in caught.value.hint for name in peers())


def test_ours_is_not_a_peer():
    assert "cnncc" not in peers()
    assert "cnncc" in KINDS


def test_a_peer_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(
        KINDS, "far", Kind("far", "Far", "a:B", "a_module_that_does_not_exist", "pip install far", "onnx")
    )
    with pytest.raises(DependencyMissing, match="Far is not installed") as caught:
        make_subjects(None, ["far"], onnx=Path("x.onnx"))
    assert caught.value.hint == "pip install far"


def test_the_bundle_comes_first():
    found = make_subjects(Path("a.cnncc"), ["torch", "ort"], onnx=Path("x.onnx"), program=Path("x.pt2"))
    assert found == (
        Subject("cnncc", "cnncc", Path("a.cnncc")),
        Subject("torch", "torch", Path("x.pt2")),
        Subject("ort", "ort", Path("x.onnx")),
    )


@pytest.mark.parametrize(
    ("against", "message"),
    [(["ort"], "'ort' has no model"), (["torch"], "'torch' has no model"), (["ort", "ort"], "named twice: ort")],
)
def test_a_peer_without_its_model_or_named_twice_is_refused(against, message):
    with pytest.raises(UsageError, match=message) as caught:
        make_subjects(Path("a.cnncc"), against)
    assert caught.value.hint or "twice" in message


def test_a_file_has_its_own_size(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"12345")
    assert subjects.engine_size(Subject("ort", "ort", tmp_path / "x.onnx")) == 5


@pytest.fixture
def everything_installed(monkeypatch):
    monkeypatch.setattr(subjects, "_has", lambda python, module: True)
    monkeypatch.setattr(subjects, "find_trtexec", lambda: "trtexec")


def test_of_a_quantized_bundle_everyone_says_what_it_multiplies(everything_installed):
    names = [name for name in peers() if name != "mnn"]
    found = make_subjects(None, names, onnx=Path("x.onnx"), program=Path("x.pt2"), quantized=True)
    assert {subject.name: (subject.precision, subject.approximate) for subject in found} == {
        "ort": ("fp32, Q/DQ", False),
        "ort-int8": ("int8", True),
        "openvino": ("int8", False),
        "torch": ("fp32", True),
        "torch-channels-last": ("fp32", True),
        "torch-compile": ("fp32", True),
        "ncnn": ("fp32", True),
        "executorch": ("fp32", True),
        "executorch-int8": ("int8", True),
        "ort-cuda": ("fp32, Q/DQ", False),
        "torch-cuda": ("fp32", True),
        "torch-compile-cuda": ("fp32", True),
        "trtexec": ("int8", False),
    }


def test_of_a_half_precision_bundle_peers_compute_in_half_too(everything_installed):
    names = [name for name in peers() if KINDS[name].gpu]
    found = make_subjects(Path("a"), names, onnx=Path("x.onnx"), program=Path("x.pt2"), half="bf16")
    assert {(subject.precision, subject.approximate) for subject in found} == {("bf16", False)}


@pytest.mark.parametrize(("name", "gpu"), [("ort", True), ("torch-compile", True), ("ort-cuda", False)])
def test_a_peer_that_computes_elsewhere_is_refused_and_those_that_do_not_are_named(name, gpu):
    with pytest.raises(UsageError, match=f"'{name}' computes on") as caught:
        check_device(name, gpu=gpu)
    assert ("trtexec" in caught.value.hint, "openvino" in caught.value.hint) == (gpu, not gpu)
    check_device(name, gpu=not gpu)


def test_without_trtexec_its_peer_is_not_installed(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(trtexec, "PLACES", ())
    with pytest.raises(DependencyMissing, match="trtexec is not installed"):
        find_kind("trtexec")


def test_of_a_float_bundle_everyone_computes_in_float_but_who_quantizes(everything_installed):
    found = make_subjects(None, peers(), onnx=Path("x.onnx"), program=Path("x.pt2"))
    odd = {subject.name for subject in found if (subject.precision, subject.approximate) != ("fp32", False)}
    assert odd == {"ort-int8", "executorch-int8"}


@pytest.mark.parametrize("name", ["mnn", "ncnn"])
def test_who_cannot_run_q_dq_is_refused(monkeypatch, name):
    monkeypatch.setattr(subjects, "_has", lambda python, module: True)
    with pytest.raises(UsageError, match="cannot run a model with Q/DQ in int8") as caught:
        make_subjects(None, [name], onnx=Path("x.onnx"), quantized=True)
    assert "ort-int8" in caught.value.hint
