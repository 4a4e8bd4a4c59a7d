"""`python -m vilu`, which torchrun needs."""

from vilu.cli import main

main()
