"""The LLVM target: ONNX to one shared library through Apache TVM, with kernels scheduled here."""
