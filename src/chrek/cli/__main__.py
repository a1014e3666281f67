"""``python -m chrek.cli``."""

from chrek.cli import main

main()
