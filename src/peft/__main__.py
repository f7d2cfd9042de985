"""``python -m peft``, for launchers such as ``accelerate launch -m peft train …``."""

from .cli import main

main()
