"""What runs inside a submitted job: the verb, then its exit code and files on the log."""

from __future__ import annotations

import sys
from pathlib import Path

from ..workers.jobs.submit import print_result
from .endings import interrupt_on_endings
from .main import main


def run() -> None:
    """Run the command line with this process's arguments; `out/` holds what is brought back."""
    interrupt_on_endings()       # a job that is stopped gets SIGTERM
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    print_result(code, Path("out"))
    sys.exit(0)


if __name__ == "__main__":
    run()
