"""int8 quantizers, ours and others, on the same models and images: ``benchmarks/accuracy.py`` puts them side by side.

A quantizer is a command (``field.py``) that makes of an fp32 ``.onnx`` and a ``.npz`` of images an int8 ``.onnx``; it
runs in a process of its own (``process.py``), the others' workers in an environment of their own. The judge
(``judge.py``) runs what they wrote in ONNX Runtime, optimizations off.
"""
