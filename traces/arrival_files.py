"""Arrivals from files: published traces in their own columns and units, or lengths alone.

Azure's CSV (dates), BurstGPT's and vidur's (seconds), Bailian's JSONL (seconds), Mooncake's
(milliseconds); other tables by what their columns are called, once the unit is told; ShareGPT's
conversations, which have no times. Rows stream; what is kept is as many requests as are asked for.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..foundation.arrays import IntArray
from ..foundation.documents import read_json
from .arrivals import Arrivals, poisson_times_us
from .row_files import header_of, json_lines, rows_of

UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}
DATE = "date"
_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", DATE: "dates"}
_NOT_A_TIME = int(np.iinfo(np.int64).min)
_MOST_US = 10**18             # 30,000 years
_MOST_TOKENS = 10**15
IMAGES = "NumImages"          # a column of Azure's multimodal trace
LOOK_AHEAD = 65_536           # rows, all later than those kept, after which reading ends
BYTES_PER_TOKEN = 4           # of text, where a file has texts and no counts
# Beyond these, the other unit is likelier.
FASTEST_PER_S, SLOWEST_PER_S, ENOUGH = 2_000.0, 1 / 600, 20


@dataclass(frozen=True)
class _Form:
    """Columns of one published trace, or of tables like it."""

    name: str
    time: str | None
    prompt: str
    output: str
    unit: str | None             # of the times; None: not told
    marks: tuple[str, ...] = ()  # columns that tell it from a form with the same others

    @property
    def needed(self) -> tuple[str, ...]:
        return tuple(name for name in (self.time, self.prompt, self.output) if name is not None)

    def fits(self, columns: Iterable[str]) -> bool:
        """Whether a table with these columns is of this form."""
        there = set(columns)
        return there >= set(self.needed) and (not self.marks or bool(there & set(self.marks)))


FORMS = (
    _Form("Azure", "TIMESTAMP", "ContextTokens", "GeneratedTokens", DATE),
    _Form("BurstGPT", "Timestamp", "Request tokens", "Response tokens", "s"),
    _Form("Bailian", "timestamp", "input_length", "output_length", "s",
          ("chat_id", "parent_chat_id", "turn")),
    _Form("Mooncake", "timestamp", "input_length", "output_length", "ms"),
    _Form("vidur", "arrived_at", "num_prefill_tokens", "num_decode_tokens", "s"),
)
# Other tables: the first name that is there counts. A unit may end the name of the time.
_TIMES = ("timestamp", "arrival_time", "arrival", "arrived_at", "start_time", "time", "ts")
_PROMPTS = ("prompt_tokens", "input_tokens", "prompt_len", "prompt_length", "input_len",
            "input_length", "context_tokens", "contexttokens", "request tokens",
            "num_prefill_tokens")
_OUTPUTS = ("output_tokens", "completion_tokens", "generated_tokens", "generatedtokens",
            "output_len", "output_length", "response tokens", "response_tokens",
            "num_decode_tokens")


def load_arrivals(
    path: Path | str, *, unit: str | None = None, most: int | None = None,
    rate_per_s: float | None = None, seed: int = 0,
) -> Arrivals:
    """Arrivals of a .csv, .jsonl or .json, the earliest at 0, in order of time.

    unit: "s", "ms" or "us" instead of the form's own. most: the earliest so many requests.
    rate_per_s: draws Poisson times where the file has lengths alone. What was read in which unit
    stands in the notes. Raises InputError naming the row (1 is the first request) and the field.
    """
    path = Path(path)
    if unit is not None and unit not in UNITS:
        raise InputError(f"unit {unit!r} of times: {', '.join(UNITS)}")
    form, rows = _opened(path)
    if form.time is None:
        return _lengths(path, form, rows, most, rate_per_s, seed)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path}: holds no request")
    unit = _unit(path, form, unit, first[1].get(form.time))
    rows = itertools.chain((first,), rows)
    kept = _Earliest(most)
    for where, row in rows:
        time_us = _time_us(row, form, unit, where)
        if kept.add(time_us, _count(row, form.prompt, where), _count(row, form.output, where)):
            break
    time_us_R, prompt_R, output_R = kept.columns()
    notes = _notes(form, unit, time_us_R, kept)
    if IMAGES in first[1]:
        notes += (f"{IMAGES} is left unread: images count as far as {form.prompt} counts them",)
    return Arrivals(
        time_us_R - time_us_R[0], prompt_R, output_R, path.name,
        (*notes, *_zero_note(prompt_R, output_R)),
    )


# ---- which form -------------------------------------------------------------------------------


Rows = Iterator[tuple[str, Mapping[str, Any]]]


def _opened(path: Path) -> tuple[_Form, Rows]:
    """The form of a file, and its rows."""
    if path.suffix == ".csv":
        return _form(path, header_of(path)), rows_of(path)
    if path.suffix == ".jsonl":
        for where, row in json_lines(path):
            if not isinstance(row, dict):
                raise InputError(f"{where}: must be a mapping, is a {type(row).__name__}")
            if "conversations" in row or "conversation" in row:
                return _TALKS, rows_of(path)
            return _form(path, row), rows_of(path)
        raise InputError(f"{path}: holds no request")
    if path.suffix == ".json":
        values = read_json(path, finite=False)
        if not isinstance(values, list) or not all(isinstance(row, dict) for row in values):
            raise InputError(f"{path}: arrivals in JSON are a list of requests")
        if not values:
            raise InputError(f"{path}: holds no request")
        rows = ((f"{path}, row {i}", row) for i, row in enumerate(values, start=1))
        talks = "conversations" in values[0] or "conversation" in values[0]
        return (_TALKS if talks else _form(path, values[0])), rows
    raise InputError(f"{path}: arrivals are read from .csv, .jsonl or .json: {_known()}")


_TALKS = _Form("ShareGPT", None, "conversations", "conversations", None)


def _form(path: Path, columns: Iterable[str]) -> _Form:
    columns = [str(name) for name in columns if name is not None]
    for form in FORMS:
        if form.fits(columns):
            return form
    lower = {name.strip().lower(): name for name in columns}
    prompt, output = (
        next((lower[name] for name in names if name in lower), None)
        for names in (_PROMPTS, _OUTPUTS)
    )
    if prompt is None or output is None:
        near = [form for form in FORMS if set(form.needed) & set(columns)]
        lacks = sorted(set(near[0].needed) - set(columns)) if near else []
        raise InputError(
            f"{path}: lacks {', '.join(lacks) or 'columns of lengths'}; it has "
            f"{', '.join(columns[:8])}: {_known()}"
        )
    for name in _TIMES:
        for suffix, unit in (("", None), *((f"_{unit}", unit) for unit in UNITS)):
            if name + suffix in lower:
                return _Form("a table", lower[name + suffix], prompt, output, unit)
    return _Form("a table", None, prompt, output, None)


def _known() -> str:
    forms = "; ".join(f"{form.name}: {', '.join(form.needed)}" for form in FORMS)
    return f"{forms}; ShareGPT: conversations"


def _unit(path: Path, form: _Form, asked: str | None, first: Any) -> str:
    dated = form.unit == DATE or (form.unit is None and isinstance(first, str) and "-" in first[1:])
    if dated and asked is not None:
        raise InputError(f"{path}: its times are dates: leave --arrivals-unit out")
    unit = asked or (DATE if dated else form.unit)
    if unit is None:
        raise InputError(
            f"{path}: does not say whether {form.time} is in seconds or milliseconds: say "
            "--arrivals-unit s, ms or us"
        )
    return unit


# ---- rows -------------------------------------------------------------------------------------


class _Earliest:
    """The earliest requests of a stream, in order; memory is bounded by how many are kept."""

    def __init__(self, most: int | None) -> None:
        self.most = most
        self.rows = 0
        self.late, self.latest_by_us = 0, 0      # rows before an earlier one, and by how much
        self._last = _NOT_A_TIME
        self._columns = array("q"), array("q"), array("q")
        self._limit: int | None = None           # what is kept is no later
        self._after = 0

    def add(self, time_us: int, prompt: int, output: int) -> bool:
        """Whether enough were read: so many rows in a row came later than those kept."""
        self.rows += 1
        if time_us < self._last:
            self.late += 1
            self.latest_by_us = max(self.latest_by_us, self._last - time_us)
        self._last = max(self._last, time_us)
        if self._limit is not None and time_us >= self._limit:
            self._after += 1
            return self._after >= LOOK_AHEAD
        self._after = 0
        for column, value in zip(self._columns, (time_us, prompt, output), strict=True):
            column.append(value)
        if self.most is not None and len(self._columns[0]) >= 2 * self.most + (
            0 if self._limit is None else LOOK_AHEAD
        ):
            self._keep_earliest()
        return False

    def _keep_earliest(self) -> None:
        assert self.most is not None
        columns = self.columns()
        self._columns = tuple(array("q", c[: self.most].tobytes()) for c in columns)  # type: ignore[assignment]
        self._limit = int(columns[0][self.most - 1])

    def columns(self) -> tuple[IntArray, IntArray, IntArray]:
        """Times, prompts and outputs, by time; ties in the file's order."""
        time, prompt, output = (np.frombuffer(c, np.int64) for c in self._columns)
        order = np.argsort(time, kind="stable")[: self.most]
        return time[order], prompt[order], output[order]


def _time_us(row: Mapping[str, Any], form: _Form, unit: str, where: str) -> int:
    assert form.time is not None
    if form.time not in row:
        raise InputError(f"{where}: lacks {form.time}")
    value = row[form.time]
    if unit == DATE:
        return _date_us(value, form.time, where)
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
        time_us = round(number * UNITS[unit])
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: {form.time} {str(value)[:40]!r} is not a number") from None
    if number < 0:
        raise InputError(f"{where}: {form.time} is {value}, must be >= 0")
    if time_us > _MOST_US:
        raise InputError(f"{where}: {form.time} is beyond 30,000 years: correct it")
    return time_us


def _date_us(text: Any, name: str, where: str) -> int:
    """Microseconds since 1970; a UTC offset of zero may follow, as in Azure's later files."""
    plain = str(text or "").strip().removesuffix("Z").removesuffix("+00:00")
    try:
        nanoseconds = int(np.datetime64(plain, "ns").astype(np.int64))
    except ValueError:
        nanoseconds = _NOT_A_TIME
    if nanoseconds == _NOT_A_TIME:  # also what an empty field turns into
        raise InputError(f"{where}: {name} {str(text)[:40]!r} is not a date and time")
    return nanoseconds // 1000


def _count(row: Mapping[str, Any], name: str, where: str) -> int:
    """A whole number >= 0, from text or JSON."""
    if name not in row:
        raise InputError(f"{where}: lacks {name}")
    value = row[name]
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
        if number != int(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: {name} {repr(value)[:40]} is not a whole number") from None
    if number < 0:
        raise InputError(f"{where}: {name} is {value}, must be >= 0")
    if number > _MOST_TOKENS:
        raise InputError(f"{where}: {name} is beyond {_MOST_TOKENS:,}: correct it")
    return int(number)


# ---- lengths alone ----------------------------------------------------------------------------


def _lengths(
    path: Path, form: _Form, rows: Rows, most: int | None, rate_per_s: float | None, seed: int
) -> Arrivals:
    """Lengths of the file, at times drawn."""
    if rate_per_s is None:
        raise InputError(
            f"{path}: holds lengths alone and no times: say at which rate requests come with --rate"
        )
    prompts, outputs = array("q"), array("q")
    skipped = 0
    for where, row in rows:
        if most is not None and len(prompts) >= most:
            break
        if form is not _TALKS:
            found: tuple[int, int] | None = (
                _count(row, form.prompt, where), _count(row, form.output, where)
            )
        else:
            found = _talk_lengths(row, where)
        if found is None:
            skipped += 1
            continue
        prompts.append(found[0])
        outputs.append(found[1])
    if not prompts:
        raise InputError(f"{path}: holds no request with a prompt and an answer")
    notes = [
        f"{form.name}: lengths alone; times are drawn, a Poisson process of {rate_per_s:g} "
        "requests/s (--rate)"
    ]
    if form is _TALKS:
        notes.append(
            f"tokens are estimated from the texts, one for {BYTES_PER_TOKEN} bytes: each "
            "conversation's first prompt and answer"
        )
    if skipped:
        notes.append(f"{skipped:,} conversations without a prompt and an answer skipped")
    prompt_R, output_R = np.frombuffer(prompts, np.int64), np.frombuffer(outputs, np.int64)
    return Arrivals(
        poisson_times_us(len(prompts), rate_per_s, seed), prompt_R, output_R, path.name,
        (*notes, *_zero_note(prompt_R, output_R)),
    )


def _talk_lengths(row: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    """Tokens of the first prompt and of what answers it; None where one is missing."""
    talk = row.get("conversations", row.get("conversation"))
    if not isinstance(talk, list):
        raise InputError(f"{where}: conversations must be a list of turns")
    texts = [
        str(turn.get("value", turn.get("content", ""))) for turn in talk if isinstance(turn, dict)
    ]
    if len(texts) < 2:
        return None
    prompt, answer = (len(text.encode("utf-8", "replace")) for text in texts[:2])
    return -(-prompt // BYTES_PER_TOKEN), -(-answer // BYTES_PER_TOKEN)


# ---- what is said of it -----------------------------------------------------------------------


def _notes(form: _Form, unit: str, time_us_R: IntArray, kept: _Earliest) -> tuple[str, ...]:
    """The unit and the rate it makes; a warning where another unit is likelier; the order."""
    span_s = int(time_us_R[-1] - time_us_R[0]) / 1e6
    count = len(time_us_R)
    rate = (count - 1) / span_s if span_s else 0.0
    told = "" if unit == DATE else "; --arrivals-unit reads them otherwise"
    notes = [
        f"{form.name}'s {form.time} in {_NAMES[unit]}: {count:,} requests in {span_s:,.3f} s, "
        f"{rate:.4g} requests/s{told}"
    ]
    if unit != DATE and count >= ENOUGH and (rate > FASTEST_PER_S or rate < SLOWEST_PER_S):
        other = {"ms": "s", "s": "ms", "us": "ms"}[unit] if rate < SLOWEST_PER_S else "s"
        if other != unit:
            notes.append(
                f"warning: {rate:.4g} requests/s is an unlikely rate: are the times in "
                f"{_NAMES[other]} (--arrivals-unit {other})?"
            )
    if kept.late:
        notes.append(
            f"{kept.late:,} of {kept.rows:,} rows came after a later one, by up to "
            f"{kept.latest_by_us / 1e6:,.3f} s: sorted by time"
        )
    return tuple(notes)


def _zero_note(prompt_R: IntArray, output_R: IntArray) -> tuple[str, ...]:
    zero = int(((prompt_R == 0) | (output_R == 0)).sum())
    if not zero:
        return ()
    return (
        f"{zero:,} of {len(prompt_R):,} requests read or write no token (cancelled or failed): "
        "served as one token",
    )
