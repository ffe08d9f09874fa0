"""The tests of a GPU, on the rehearsed one: `python -m support.rehearsal.gpu_tests DEVICE.so [PYTEST ARGUMENTS]`.

Left out is what cannot be shown here: the kernels of Inductor, Liger and bitsandbytes, and a limit set in torch.
"""

from __future__ import annotations

import sys

import pytest

from support.rehearsal import gpu

LEFT_OUT = "not liger and not bitsandbytes and not eight_bits and not qlora and not real_memory"


def main() -> int:
    """Run them and return pytest's exit code."""
    gpu.arrive(sys.argv[1])
    from support.rehearsal import kernels, nccl

    nccl.install()
    library_of_kernels = kernels.install_varlen()
    kernels.install_flash_attn()
    code = pytest.main(["-m", "gpu", "-k", LEFT_OUT, "-p", "no:cacheprovider", "-q", *sys.argv[2:]])
    del library_of_kernels
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
