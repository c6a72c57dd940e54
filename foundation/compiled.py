"""The one door to numba: how hot loops are compiled, and their random numbers.

Knows compiler options only. Compiled functions release the GIL, so that layers can run in threads,
and are cached on disk, so that only the first call on a machine pays for compilation. Sums keep
the order they are written in, so a result does not depend on the machine's vector width.

Which door: `compiled` is IEEE arithmetic as written, for all that decides plans and traces.
`compiled_finite` for maxima over long rows, `compiled_inline` for small steps of a loop.
`compiled_fused`, for the experts' products alone, lets a product fuse into the sum that takes it:
faster, rounded once less, and so other bits than `compiled` gives. `compiled_part` and
`compiled_generic` are for the parts of one large loop (`placement/search/annealing`).
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar, cast

import llvmlite.binding as llvm
import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import caching
from numba.core import cgutils as numba_cgutils
from numba.extending import intrinsic, overload

Function = TypeVar("Function", bound=Callable[..., Any])
RandomState = npt.NDArray[np.uint64]


# numba declares no types for these, or not all of their options.
njit: Any = numba.njit
_index: Any = caching.IndexDataCacheFile
_load_index = _index._load_index
_locator: Any = caching._SourceFileBackedLocatorMixin


def _load_index_or_none(index: Any) -> Any:
    """numba reads an index before it looks whether the source has changed since. After an upgrade
    an index may name what is gone: then nothing is cached, and the loop is compiled again."""
    try:
        return _load_index(index)
    except (AttributeError, ImportError, EOFError, pickle.UnpicklingError):
        return {}


_index._load_index = _load_index_or_none


def travelling_cache(source: Path) -> tuple[Path, ...]:
    """Files with a module's compiled code that are good for a copy of the module elsewhere too.

    Those whose index fits the source as it is: numba knows a source file by its content.
    """
    stamp = _locator.get_source_stamp(SimpleNamespace(_py_file=str(source)))
    if not isinstance(stamp, bytes):        # numbas that know it by its time of change
        return ()
    found: list[Path] = []
    folder = source.parent / "__pycache__"
    for index in sorted(folder.glob(f"{source.stem}.*.nbi")):
        try:
            with index.open("rb") as file:
                version = pickle.load(file)
                kept, overloads = pickle.load(file)
        except (OSError, AttributeError, ImportError, EOFError, ValueError, pickle.PickleError):
            continue
        if version == numba.__version__ and kept == stamp:
            found += [index, *(folder / name for name in sorted(overloads.values()))]
    return tuple(path for path in found if path.is_file())


cgutils: Any = numba_cgutils


def compiled(function: Function) -> Function:
    """Compile with IEEE arithmetic; infinities allowed."""
    jit = njit(cache=True, nogil=True, error_model="numpy", _nrt=True)
    return cast(Function, jit(function))


def compiled_finite(function: Function) -> Function:
    """Compile for finite numbers only, so that maxima over long rows use vector units.

    Maxima may be taken in any order (the result is the same); sums may not.
    """
    jit = numba.njit(
        cache=True, nogil=True, error_model="numpy", fastmath={"nnan", "ninf", "nsz"}
    )
    return cast(Function, jit(function))


def compiled_inline(function: Function) -> Function:
    """As `compiled`, inlined into its callers: for small steps of a hot loop that pass tuples."""
    jit = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
    return cast(Function, jit(function))


def compiled_fused(function: Function) -> Function:
    """As `compiled`, but products may fuse into sums; nothing else is relaxed."""
    jit = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
    return cast(Function, jit(function))


@functools.cache
def compiles_for(feature: str) -> bool:
    """Whether compiled loops may use a feature of the processor, by LLVM's name.

    What NUMBA_CPU_FEATURES allows where it is set; otherwise what the processor has.
    """
    config: Any = numba.config
    chosen: str | None = config.CPU_FEATURES
    if chosen is None:
        return bool(llvm.get_host_cpu_features().get(feature, False))
    return f"+{feature}" in chosen.split(",")


# Parts of a hot loop have no door from Python, which takes longer to compile than they do where
# tuples of many arrays are passed; and they count no references to arrays, which takes longer than
# their work. So they can't make arrays.
_PART = {
    "cache": True, "nogil": True, "error_model": "numpy", "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True, "_nrt": False,
}


def compiled_part(function: Function) -> Function:
    """As `compiled`, for compiled callers only, and without making arrays."""
    return cast(Function, njit(**_PART)(function))


def compiled_part_inline(function: Function) -> Function:
    """As `compiled_part`, inlined into its callers: for the small steps of a loop."""
    return cast(Function, njit(forceinline=True, **_PART)(function))


class Generic(Protocol):
    """A function with one body for every type of its first argument."""

    def __call__(self, first: Any, *rest: Any) -> Any: ...

    def of(self, kind: type) -> Callable[[Function], Function]:
        """The body for this type."""


def compiled_generic(stub: Callable[..., Any]) -> Generic:
    """A function of compiled code with one body for every type of its first argument.

    `@stub.of(Kind)` gives the body for the NamedTuple `Kind`, a part as above. A compiled function
    that takes any kind and calls the stub is compiled, and cached on disk, once for each kind, with
    that kind's bodies inside: as fast as if it had been written for it.
    """
    bodies: dict[Any, Callable[..., Any]] = {}

    @functools.wraps(stub)
    def generic(first: Any, *rest: Any) -> Any:
        return bodies[type(first)](first, *rest)

    def of(kind: type) -> Callable[[Function], Function]:
        def add(body: Function) -> Function:
            bodies[kind] = body
            return body

        return add

    def choose(first: Any, *_rest: Any) -> Callable[..., Any] | None:
        return bodies.get(getattr(first, "instance_class", None))

    options: Any = {"nogil": True, "error_model": "numpy", "forceinline": True, "_nrt": False}
    overload(generic, jit_options=options, strict=False)(choose)
    generic.of = of  # type: ignore[attr-defined]
    return cast(Generic, generic)


@intrinsic
def _prefetch(typing_context: Any, array: Any, first: Any, second: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        given = context.make_array(signature.args[0])(context, builder, arguments[0])
        strides = cgutils.unpack_tuple(builder, given.strides)
        offset = builder.add(
            builder.mul(arguments[1], strides[0]), builder.mul(arguments[2], strides[1])
        )
        add, insert = cgutils.pointer_add, cgutils.get_or_insert_function
        place = add(builder, given.data, offset)
        word = ir.IntType(32)
        takes = ir.FunctionType(ir.VoidType(), [place.type, word, word, word])
        # LLVM completes the name with its own form of the pointer's type.
        call = insert(builder.module, takes, "llvm.prefetch")
        to_read, every_cache, data_cache = (ir.Constant(word, n) for n in (0, 3, 1))
        builder.call(call, [place, to_read, every_cache, data_cache])
        return context.get_dummy_value()

    return numba.types.void(array, numba.types.intp, numba.types.intp), generate


# In compiled code `prefetch(array, i, j)` requests the cache line of array[i, j] and does not wait:
# for rows read in an order the processor cannot guess.
prefetch = cast(Callable[[Any, Any, Any], None], _prefetch)


@intrinsic
def _clock(typing_context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, double = ir.IntType(64), ir.DoubleType()
        time = cgutils.alloca_once(builder, ir.ArrayType(word, 2))      # seconds, nanoseconds
        takes = ir.FunctionType(ir.IntType(32), [ir.IntType(32), time.type])
        call = cgutils.get_or_insert_function(builder.module, takes, "clock_gettime")
        builder.call(call, [ir.Constant(ir.IntType(32), 0), time])      # 0: the time of day
        seconds, nanoseconds = (
            builder.sitofp(builder.load(cgutils.gep_inbounds(builder, time, 0, i)), double)
            for i in range(2)
        )
        return builder.fadd(seconds, builder.fmul(nanoseconds, ir.Constant(double, 1e-9)))

    return numba.types.float64(), generate


# In compiled code `clock()` is `time.time()`: loops that run for long keep a time limit by it.
clock = cast(Callable[[], float], _clock)


def random_state(seed: int, *stream: int) -> RandomState:
    """State for `next_random`; one independent stream per (seed, stream...)."""
    state = np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)
    return np.asarray(state | np.uint64(1), np.uint64)


@compiled_inline
def splitmix(z: Any) -> Any:
    """64 well-mixed bits from 64 (the finaliser of splitmix64). z: uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled
def next_random(state: RandomState) -> float:
    """The next number in [0, 1): xorshift64*, 53 bits. Changes `state`."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return np.float64((x * np.uint64(2685821657736338717)) >> np.uint64(11)) / 9007199254740992.0


@compiled
def next_below(state: RandomState, n: int) -> int:
    """The next whole number in [0, n)."""
    return int(next_random(state) * n)
