"""`python -m loadmaster`: the command line."""

from .cli import main

main()
