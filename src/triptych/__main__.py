"""``python -m triptych``, for torchrun."""

from triptych.cli import main

main()
