"""Tokens of a stream kept on disk while it is read, so that memory does not grow with its length.

Knows numbers. Knows nothing of where they are from.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import numpy.typing as npt

from ....errors import InputError

_DTYPE = np.int32


class Spool:
    """Choices [t, R, K] and columns, appended in order; then mapped as one array each.

    The files have no name and go with the last array that maps them. They lie where Python's
    tempfile puts them (TMPDIR).
    """

    def __init__(self) -> None:
        self.shape: tuple[int, int] | None = None
        self.tokens = 0
        self._ids: Any = tempfile.TemporaryFile()  # noqa: SIM115  (mapped later)
        self._columns: dict[str, Any] = {}

    def add(self, ids_TRK: npt.NDArray[Any], where: str, **columns: Any) -> None:
        """Tokens; each column is one number for all of them, or one each. Raises InputError on
        another shape than before, or what are no whole numbers.
        """
        if ids_TRK.ndim != 3 or ids_TRK.dtype.kind not in "iu":
            raise InputError(
                f"{where}: holds {ids_TRK.dtype} {list(ids_TRK.shape)}, not ids [T, L, K]"
            )
        if not len(ids_TRK):
            return
        shape = (int(ids_TRK.shape[1]), int(ids_TRK.shape[2]))
        if self.shape not in (None, shape):
            raise InputError(
                f"{where}: holds {shape[0]} layers x top-{shape[1]}, those before "
                f"{self.shape[0]} x top-{self.shape[1]}: of another model"
            )
        self.shape = shape
        top = np.iinfo(_DTYPE).max
        ids_TRK = np.minimum(ids_TRK, top) if ids_TRK.dtype.itemsize > 4 else ids_TRK
        self._ids.write(np.ascontiguousarray(ids_TRK, _DTYPE).tobytes())
        for name, value in columns.items():
            if name not in self._columns:
                self._columns[name] = tempfile.TemporaryFile()  # noqa: SIM115
            file = self._columns[name]
            column = np.broadcast_to(np.asarray(value, np.int64), (len(ids_TRK),))
            file.write(np.ascontiguousarray(column).tobytes())
        self.tokens += len(ids_TRK)

    def ids(self) -> npt.NDArray[Any]:
        """[T, R, K] all that was added, mapped."""
        assert self.shape is not None, "nothing was added"
        self._ids.flush()
        return np.memmap(self._ids, _DTYPE, "r", shape=(self.tokens, *self.shape))

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """[T] each, mapped."""
        for file in self._columns.values():
            file.flush()
        return {
            name: np.memmap(file, np.int64, "r", shape=(self.tokens,))
            for name, file in self._columns.items()
        }
