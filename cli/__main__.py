"""`python -m loadmaster.cli`: the command line, where no console script is on the path."""

from .main import main

main()
