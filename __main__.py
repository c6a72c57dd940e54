"""`python -m loadmaster`: the command line."""

from .cli.main import main

main()
