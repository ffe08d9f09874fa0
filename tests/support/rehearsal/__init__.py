"""A GPU rehearsed on a machine without one: a process that has called `gpu.arrive` has a CUDA device made of host memory.

Such a process is of its own, never that of the tests: nothing of it can be taken back.
"""
