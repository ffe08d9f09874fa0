"""`python -m btrm_core`, for launchers that start a module (torchrun, accelerate launch, deepspeed)."""

from __future__ import annotations

from btrm_core.cli import main

if __name__ == "__main__":
    main()
