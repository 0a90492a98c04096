"""Engines without a virtual machine: C that calls kernels one after the other, in memory that was planned ahead."""
