"""Arithmetic of 64 bits for machines of 32: what LLVM calls by name there, and a C compiler's library would bring."""
