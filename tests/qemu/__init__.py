"""An AArch64 board without a board: engines run under qemu, on TVM's own runtime for that machine."""
