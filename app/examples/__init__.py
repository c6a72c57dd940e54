"""Files that work, one of each kind that verbs read and people write: to print, change and use.

`example` answers with the text. The texts lie beside it, as they are written. Knows nothing of what
the fields mean.
"""

from __future__ import annotations

from importlib import resources

from ...errors import UsageError

# kind -> its file and the verb that reads it, as a person types it
KINDS = {
    "grid": ("grid.yaml", "loadmaster whatif TRACE {path} --model MODEL"),
    "faults": ("faults.yaml", "loadmaster simulate TRACE PLAN --model MODEL --faults {path}"),
    "cluster": ("cluster.yaml", "loadmaster plan TRACE --cluster {path}"),
    "model": ("model.json", "loadmaster plan TRACE --model {path}"),
}


def example(kind: str) -> str:
    """The text of a file of that kind. Raises UsageError where there is none."""
    if kind not in KINDS:
        raise UsageError(f"no example {kind!r}; there are: {', '.join(KINDS)}")
    return resources.files(__package__).joinpath(KINDS[kind][0]).read_text("utf-8")


def usage(kind: str, path: object) -> str:
    """The command that reads a file of that kind."""
    return KINDS[kind][1].format(path=path)
