"""Arrivals from processes and files; a bad row is named by its number and field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadmaster.errors import InputError, UsageError
from loadmaster.traces.arrivals import Arrivals, Length, gamma, load_arrivals, poisson


def gaps_cv(arrivals: Arrivals) -> float:
    gaps = np.diff(arrivals.time_us)
    return float(gaps.std() / gaps.mean())


@pytest.mark.parametrize(("cv", "tolerance"), [(0.5, 0.02), (1.0, 0.02), (3.0, 0.2)])
def test_gamma_gaps_have_the_rate_and_spread_asked_for(cv: float, tolerance: float) -> None:
    made = gamma(40_000, 20.0, cv=cv, seed=1)
    assert made.rate_per_s == pytest.approx(20, rel=0.05)
    assert gaps_cv(made) == pytest.approx(cv, abs=tolerance)


def test_a_metronome_has_equal_gaps() -> None:
    assert gamma(5, 2.0, cv=0).time_us.tolist() == [500_000 * i for i in range(1, 6)]


def test_poisson_counts_have_equal_mean_and_variance() -> None:
    """The property that makes it Poisson: counts per second."""
    made = poisson(50_000, 10.0, seed=2)
    counts = np.bincount(made.time_us // 1_000_000)[1:-1]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.08)


def test_lengths_have_the_mean_and_spread_asked_for() -> None:
    made = poisson(40_000, 5.0, prompt=Length(800, 0.5), output=Length(100), seed=3)
    assert made.prompt_tokens.mean() == pytest.approx(800, rel=0.02)
    assert made.prompt_tokens.std() / 800 == pytest.approx(0.5, abs=0.02)
    assert set(made.output_tokens) == {100}
    assert Length(1, 3.0).sample(np.random.default_rng(0), 1000).min() == 1


def test_other_lengths_leave_the_times_alone() -> None:
    """Separate random streams: a comparison over lengths is paired in time."""
    a = poisson(100, 5.0, prompt=Length(800), seed=4)
    b = poisson(100, 5.0, prompt=Length(80, 2.0), seed=4)
    assert np.array_equal(a.time_us, b.time_us)
    assert np.array_equal(a.output_tokens, b.output_tokens)


def test_a_scaled_rate_keeps_the_requests() -> None:
    made = poisson(100, 5.0, seed=5)
    assert made.scaled(2).rate_per_s == pytest.approx(2 * made.rate_per_s, rel=1e-3)
    assert np.array_equal(made.scaled(2).prompt_tokens, made.prompt_tokens)


@pytest.mark.parametrize(
    "make", [lambda: poisson(0, 1.0), lambda: poisson(1, 0.0), lambda: gamma(1, 1.0, cv=-1),
             lambda: Length(0.5), lambda: poisson(2, 1.0).scaled(0)],
)
def test_processes_that_cannot_be_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        make()


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"


def test_azures_file_is_read_with_its_seven_decimals(tmp_path: Path) -> None:
    """CRLF lines, times from the first request; later files carry a UTC offset."""
    path = tmp_path / "a.csv"
    path.write_text(
        AZURE + "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109\r\n"
        "2023-11-16 18:15:51.000000+00:00,1,0\r\n"
    )
    made = load_arrivals(path)
    assert made.time_us.tolist() == [0, 4_314_579, 4_319_410]
    assert made.prompt_tokens.tolist() == [374, 396, 1]
    assert made.output_tokens.tolist() == [44, 109, 0]


def test_mooncakes_file_is_read_in_milliseconds(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    rows = [{"timestamp": t, "input_length": 6758, "output_length": n, "hash_ids": [0, 1]}
            for t, n in ((3000, 500), (3000, 3), (5999, 26))]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    made = load_arrivals(path)
    assert made.time_us.tolist() == [0, 0, 2_999_000]
    assert made.output_tokens.tolist() == [500, 3, 26]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("x,1,2\r\n", r"row 1: TIMESTAMP 'x'"),
        (",1,2\r\n", r"row 1: TIMESTAMP ''"),
        ("2023-01-01 00:00:00,1,2\r\n2023-01-01 00:00:01,-4,2\r\n", r"row 2: ContextTokens is -4"),
        ("2023-01-01 00:00:00,1,many\r\n", r"row 1: GeneratedTokens 'many'"),
        ("2023-01-01 00:00:00,1\r\n", r"row 1: GeneratedTokens None"),
        ("2023-01-01 00:00:05,1,1\r\n2023-01-01 00:00:04,1,1\r\n", r"row 2: .*before .* row 1"),
        ("", "no request"),
    ],
)
def test_a_bad_row_of_azures_file_is_named(tmp_path: Path, rows: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(AZURE + rows)
    with pytest.raises(InputError, match=message):
        load_arrivals(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "row 2: not JSON"),
        ("[1]", "row 2: lacks timestamp"),
        ('{"timestamp": 5, "input_length": 1}', "row 2: lacks output_length"),
        ('{"timestamp": 5, "input_length": 1.5, "output_length": 1}', "row 2: input_length 1.5"),
        ('{"timestamp": 5, "input_length": 1, "output_length": true}', "output_length True"),
        ('{"timestamp": -5, "input_length": 1, "output_length": 1}', "timestamp is -5"),
        ('{"timestamp": 5, "input_length": 1, "output_length": Infinity}', "output_length inf"),
    ],
)
def test_a_bad_row_of_mooncakes_file_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"timestamp": 1, "input_length": 1, "output_length": 1}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        load_arrivals(path)


def test_another_file_is_refused_with_the_formats_there_are(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("time,tokens\n1,2\n")
    with pytest.raises(InputError, match="lacks TIMESTAMP, ContextTokens, GeneratedTokens"):
        load_arrivals(tmp_path / "a.csv")
    with pytest.raises(InputError, match=r"\.csv \(Azure"):
        load_arrivals(Path("x.parquet"))
    with pytest.raises(InputError, match="cannot be read"):
        load_arrivals(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([0, 5], [1, 1], [1]), "equally many"),
        (([], [], []), "at least one request"),
        (([5, 0], [1, 1], [1, 1]), "request 1 is before"),
        (([0, 5], [1, -1], [1, 1]), "prompt_tokens of request 1 is -1"),
    ],
)
def test_arrays_that_cannot_be_arrivals_are_named(columns: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        time_us, prompt, output = (np.array(c, np.int64) for c in columns)
        Arrivals(time_us, prompt, output)


def test_the_published_hour_of_azure(real_data: Path) -> None:
    """19,366 requests at 5.53 per second, cv of the gaps 1.09, median prompt 1,020."""
    made = load_arrivals(real_data / "arrivals/azure_conv_2023.csv")
    assert len(made) == 19_366
    assert made.rate_per_s == pytest.approx(5.53, abs=0.005)
    assert gaps_cv(made) == pytest.approx(1.09, abs=0.01)
    assert np.median(made.prompt_tokens) == 1020


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("huge.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16," + "9" * 30 + ",1"),
        ("quote.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n\"" + "x" * 200_000),
        ("time.jsonl", '{"timestamp": 1e300, "input_length": 1, "output_length": 1}\n'),
        ("digits.jsonl", f'{{"timestamp": 1, "input_length": "{"9" * 5000}", "output_length": 1}}'),
        ("length.jsonl", '{"timestamp": 1, "input_length": 1' + "0" * 30 + ', "output_length": 1}'),
        ("deep.jsonl", "[" * 100_000 + "\n"),
    ],
)
def test_numbers_and_lines_beyond_all_bounds_are_one_short_line(
    tmp_path: Path, name: str, text: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=name) as caught:
        load_arrivals(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 200
