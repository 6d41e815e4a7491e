"""Cycles of a Pallas TPU kernel by the TPU compiler's own final schedule, without a TPU.

`compiling.start` prepares the process, `compiling.compile_for` compiles, `bundles.read_kernel`
reads the schedule's loops and predicated regions, `cost.attribute` multiplies them by how often
each runs. Every figure is compiler-predicted: no stall on memory, no instruction fetch, nothing
executed.
"""
