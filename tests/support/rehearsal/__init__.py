"""A GPU rehearsed on a machine without one: after `gpu.arrive` a process has a CUDA device made of host memory.

Such a process is of its own, never that of the tests: nothing of it can be taken back.
"""
