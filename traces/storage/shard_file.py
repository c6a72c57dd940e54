"""One shard: a Parquet file with one fixed_size_binary column per layer.

Turns a piece of a RoutingTrace into bytes and back. Knows Parquet. Knows nothing of folders,
manifests or who records.

Columns: `ids_LLL` (K ids, 1 byte each up to 256 experts, 2 above, little endian), `gates_LLL`
(K float16), `k_of_token` (L bytes), and integers `step`, `request`, `source`, `phase`, `domain`.
Expert ids are close to white noise: zstd's entropy coder reaches their entropy at its fastest
level, its match finder finds nothing more (benchmarks/traces.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import InputError
from ..trace import RoutingTrace
from .manifest import Manifest

_INTEGERS = {
    "step": pa.int64(), "request": pa.int64(), "source": pa.int32(), "phase": pa.uint8(),
    "domain": pa.int32(),
}
Columns = dict[str, npt.NDArray[Any]]


def ids_column(layer: int) -> str:
    """Name of a layer's column of expert ids."""
    return f"ids_{layer:03d}"


def gates_column(layer: int) -> str:
    """Name of a layer's column of gate weights."""
    return f"gates_{layer:03d}"


class _HashingSink:
    """A file for pyarrow that counts and hashes what goes through, column by column."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True


def write_shard(trace: RoutingTrace, manifest: Manifest, file: BinaryIO) -> tuple[int, str]:
    """Write one shard with all tokens of `trace`; returns its size in bytes and its sha256.

    Copies no id that lies layer by layer, and keeps no copy of the file. The trace must have the
    manifest's shape and at least its columns (the caller has checked).
    """
    sink = _HashingSink(file)
    arrays: dict[str, pa.Array] = {}
    id_type = np.dtype(f"<u{manifest.id_bytes}")
    for layer in range(manifest.num_layers):
        arrays[ids_column(layer)] = _binary(trace.ids[:, layer], id_type)
    gates: list[str] = []
    for name in manifest.columns:
        column = getattr(trace, name)
        if name == "gates":
            for layer in range(manifest.num_layers):
                gates.append(gates_column(layer))
                arrays[gates[-1]] = _binary(column[:, layer], np.dtype("<f2"))
        elif name == "k_of_token":
            arrays[name] = _binary(column, np.dtype("u1"))
        else:
            arrays[name] = pa.array(column, _INTEGERS[name])
    pq.write_table(
        pa.table(arrays), pa.PythonFile(sink, mode="w"),
        compression="zstd", compression_level=1, write_statistics=False,
        row_group_size=max(1, trace.num_tokens),
        use_dictionary=[n for n in ("source", "phase", "domain") if n in arrays] or False,
        use_byte_stream_split=gates or False,
        column_encoding={n: "DELTA_BINARY_PACKED" for n in ("step", "request") if n in arrays}
        or None,
    )
    return sink.bytes, sink.sha256.hexdigest()


def read_shard(
    path: Path, manifest: Manifest, layers: Sequence[int], columns: Sequence[str], tokens: int
) -> Columns:
    """Chosen columns of one shard: `ids [L', T, K]` (layer by layer), and those in `columns`.

    Reads nothing else of the file. Raises InputError where the file is not what the manifest says.
    """
    names = [ids_column(layer) for layer in layers]
    for column in columns:
        names += [gates_column(layer) for layer in layers] if column == "gates" else [column]
    try:
        with _readable(path) as source:
            table = pq.read_table(source, columns=names, use_threads=False, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet shard: {_one_line(error)}") from error
    missing = sorted(set(names) - set(table.column_names))
    if missing or table.num_rows != tokens:
        raise InputError(
            f"{path}: holds {table.num_rows} tokens and lacks {missing or 'no column'}; the "
            f"manifest says {tokens} tokens: the shard was replaced, restore it or record again"
        )
    out: Columns = {
        "ids": _stacked(table, [ids_column(i) for i in layers], np.dtype(f"<u{manifest.id_bytes}"),
                        manifest.top_k, path)
    }
    for column in columns:
        if column == "gates":
            names = [gates_column(layer) for layer in layers]
            out[column] = _stacked(table, names, np.dtype("<f2"), manifest.top_k, path)
        elif column == "k_of_token":
            out[column] = _stacked(
                table, [column], np.dtype("u1"), manifest.num_layers, path
            )[0][:, list(layers)]
        else:
            out[column] = table.column(column).to_numpy()
    return out


def _readable(path: Path) -> AbstractContextManager[Any]:
    """The path; the open file where its name is bytes that are no text, which Arrow cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return path.open("rb")
    return nullcontext(path)


def _binary(values_TK: npt.NDArray[Any], dtype: np.dtype[Any]) -> pa.Array:
    """[T, K] numbers as T binary strings; no copy where they lie contiguous in that dtype."""
    values = np.ascontiguousarray(values_TK, dtype)
    width = values.shape[1] * dtype.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(values), [None, pa.py_buffer(values)]
    )


def _stacked(
    table: pa.Table, names: Sequence[str], dtype: np.dtype[Any], width: int, path: Path
) -> npt.NDArray[Any]:
    """[len(names), T, width] numbers of these binary columns."""
    out = np.empty((len(names), table.num_rows, width), dtype.newbyteorder("="))
    for row, name in enumerate(names):
        column = table.column(name)
        if column.type != pa.binary(width * dtype.itemsize) or column.null_count:
            raise InputError(
                f"{path}: column {name} is {column.type}, the manifest needs "
                f"{width * dtype.itemsize} bytes a token: restore the shard or record again"
            )
        start = 0
        for chunk in column.chunks:
            flat = np.frombuffer(chunk.buffers()[1], dtype)
            begin = chunk.offset * width
            out[row, start : start + len(chunk)] = flat[
                begin : begin + len(chunk) * width
            ].reshape(-1, width)
            start += len(chunk)
    return out


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
