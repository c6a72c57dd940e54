"""Arrivals from files: each form in its own unit; a bad row is named by its number and field."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadmaster.errors import InputError
from loadmaster.simulator.serving.workload import as_workload
from loadmaster.traces import arrival_files
from loadmaster.traces.arrival_files import load_arrivals


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


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
        ("[1]", "row 2: must be a mapping"),
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
    with pytest.raises(InputError, match="lacks columns of lengths; it has time, tokens: Azure"):
        load_arrivals(tmp_path / "a.csv")
    with pytest.raises(InputError, match=r"\.csv, \.jsonl or \.json: Azure"):
        load_arrivals(Path("x.parquet"))
    with pytest.raises(InputError, match="cannot be read"):
        load_arrivals(tmp_path / "absent.csv")


def test_the_published_hour_of_azure(real_data: Path) -> None:
    """19,366 requests at 5.53 per second, cv of the gaps 1.09, median prompt 1,020."""
    made = load_arrivals(real_data / "arrivals/azure_conv_2023.csv")
    assert len(made) == 19_366
    assert made.rate_per_s == pytest.approx(5.53, abs=0.005)
    gaps = np.diff(made.time_us)
    assert gaps.std() / gaps.mean() == pytest.approx(1.09, abs=0.01)
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


# ---- units ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "more", "times", "expected_us", "said"), [
    ("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type", "{t},GPT-4,7,3,10,API",
     (5, 45), [0, 40_000_000], "BurstGPT's Timestamp in seconds: 2 requests in 40.000 s, 0.025 "),
    ("Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
     "{t},a,1,GPT-4,7,3,10,API", (0.5, 1), [0, 500_000], "2 requests/s"),
    ("arrived_at,num_prefill_tokens,num_decode_tokens", "{t},7,3", (0.125, 0.25), [0, 125_000],
     "vidur's arrived_at in seconds"),
    ("TIMESTAMP,NumImages,ContextTokens,GeneratedTokens", "{t},2,7,3",
     ("2025-02-01 00:00:00.1+00:00", "2025-02-01 00:00:01.2+00:00"), [0, 1_100_000],
     "Azure's TIMESTAMP in dates"),
    ("time_ms,prompt_tokens,output_tokens", "{t},7,3", (10, 12), [0, 2_000], "in milliseconds"),
    ("start_time,input_len,output_len", "{t},7,3",
     ("2025-02-01T00:00:00", "2025-02-01T00:00:01"), [0, 1_000_000], "in dates"),
])
def test_a_table_is_read_in_its_own_unit_and_says_the_rate(
    tmp_path: Path, columns: str, more: str, times: tuple[Any, ...], expected_us: list[int],
    said: str,
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("\n".join([columns, *(more.format(t=t) for t in times)]) + "\n")
    made = load_arrivals(path)
    assert made.time_us.tolist() == expected_us
    assert made.prompt_tokens.tolist() == [7, 7] and made.output_tokens.tolist() == [3, 3]
    assert said in made.notes[0] and "requests/s" in made.notes[0]


def test_the_same_three_columns_are_seconds_where_chats_are_numbered(tmp_path: Path) -> None:
    """Bailian counts seconds, Mooncake milliseconds; the unit given beats both."""
    row = {"input_length": 9, "output_length": 2}
    chats = lines(tmp_path / "b.jsonl", [{"chat_id": i, "timestamp": t, **row}
                                         for i, t in enumerate((0, 60, 61.5))])
    assert load_arrivals(chats).time_us.tolist() == [0, 60_000_000, 61_500_000]
    blocks = lines(tmp_path / "m.jsonl", [{"timestamp": t, **row} for t in (27.0, 30.5)])
    assert load_arrivals(blocks).time_us.tolist() == [0, 3_500]
    assert load_arrivals(blocks, unit="s").time_us.tolist() == [0, 3_500_000]
    assert "in seconds" in load_arrivals(blocks, unit="s").notes[0]


def test_a_unit_that_nobody_tells_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("arrival_time,prompt_tokens,output_tokens\n1,7,3\n3,7,3\n")
    with pytest.raises(InputError, match=r"seconds or milliseconds: say unit s, ms"):
        load_arrivals(path)
    assert load_arrivals(path, unit="ms").time_us.tolist() == [0, 2_000]
    with pytest.raises(InputError, match="unit 'h' of times: s, ms, us"):
        load_arrivals(path, unit="h")


def test_an_unlikely_rate_asks_whether_the_unit_is_another(tmp_path: Path) -> None:
    row = {"input_length": 9, "output_length": 2}
    path = lines(tmp_path / "m.jsonl", [{"timestamp": t / 5, **row} for t in range(50)])
    made = load_arrivals(path)
    assert made.rate_per_s == pytest.approx(5_000)
    assert "unlikely rate: are the times in seconds (--arrivals-unit s)?" in made.notes[1]
    assert len(load_arrivals(path, unit="s").notes) == 1


def test_rows_out_of_order_are_sorted_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(AZURE + "2024-05-10 00:00:02+00:00,1,1\n2024-05-10 00:00:00.5+00:00,2,2\n"
                    "2024-05-10 00:00:02+00:00,3,3\n")
    made = load_arrivals(path)
    assert made.time_us.tolist() == [0, 1_500_000, 1_500_000]
    assert made.prompt_tokens.tolist() == [2, 1, 3]
    assert "1 of 3 rows came after a later one, by up to 1.500 s: sorted" in made.notes[1]


def test_requests_without_tokens_are_served_as_one_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(AZURE + "2023-11-16 18:17:03,4808,0\n2023-11-16 18:17:04,0,8\n")
    made = load_arrivals(path)
    assert "2 of 2 requests read or write no token" in made.notes[-1]
    work = as_workload(made)
    assert work.prompt_tokens.tolist() == [4808, 1] and work.output_tokens.tolist() == [1, 8]


# ---- lengths alone ----------------------------------------------------------------------------


def test_conversations_are_lengths_alone(tmp_path: Path) -> None:
    talks = [
        {"id": "a", "conversations": [{"from": "human", "value": "x" * 40},
                                      {"from": "gpt", "value": "y" * 9}, {"from": "human"}]},
        {"id": "b", "conversations": [{"from": "human", "value": "alone"}]},
        {"id": "c", "conversations": [{"role": "user", "content": "z"},
                                      {"role": "assistant", "content": "z" * 8}]},
    ]
    (tmp_path / "s.json").write_text(json.dumps(talks))
    with pytest.raises(InputError, match=r"lengths alone and no times.*rate_per_s"):
        load_arrivals(tmp_path / "s.json")
    made = load_arrivals(tmp_path / "s.json", rate_per_s=2.0, seed=3)
    assert made.prompt_tokens.tolist() == [10, 1] and made.output_tokens.tolist() == [3, 2]
    said = " ".join(made.notes)
    assert "a Poisson process of 2 requests/s" in said and "estimated from the texts" in said
    assert "1 conversations without a prompt and an answer skipped" in said
    again = load_arrivals(lines(tmp_path / "s.jsonl", talks), rate_per_s=2.0, seed=3)
    assert again.time_us.tolist() == made.time_us.tolist()


def test_a_table_without_times_is_lengths_alone(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("prompt_len,output_len\n5,6\n7,8\n")
    made = load_arrivals(tmp_path / "l.csv", rate_per_s=1.0)
    assert made.prompt_tokens.tolist() == [5, 7] and made.output_tokens.tolist() == [6, 8]
    assert "estimated" not in " ".join(made.notes)


# ---- streams ----------------------------------------------------------------------------------


def test_the_earliest_requests_are_kept_whatever_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow way: read all, sort, take the first."""
    monkeypatch.setattr(arrival_files, "LOOK_AHEAD", 200)
    rng = np.random.default_rng(0)
    rows = [{"timestamp": int(t), "input_length": i, "output_length": 1}
            for i, t in enumerate(rng.integers(0, 5_000, 3_000))]
    path = lines(tmp_path / "m.jsonl", rows)
    expected = sorted(rows, key=lambda row: row["timestamp"])[:100]
    made = load_arrivals(path, most=100)
    assert made.prompt_tokens.tolist() == [row["input_length"] for row in expected]


def test_reading_ends_when_long_nothing_earlier_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file in order, a broken row far behind those asked for is never reached."""
    monkeypatch.setattr(arrival_files, "LOOK_AHEAD", 50)
    rows = [{"timestamp": t, "input_length": 1, "output_length": 1} for t in range(1_000)]
    path = lines(tmp_path / "m.jsonl", rows)
    path.write_text(path.read_text() + "rubbish\n")
    assert len(load_arrivals(path, most=100)) == 100
    with pytest.raises(InputError, match="row 1001"):
        load_arrivals(path)


def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.csv"
        path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(
            f"{rows - i},5,5\n" for i in range(rows)      # backwards: nothing can end early
        ))
        tracemalloc.start()
        assert load_arrivals(path, most=100).time_us[-1] == 99_000_000
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    monkeypatch.setattr(arrival_files, "LOOK_AHEAD", 1_000)
    assert peak(40_000) < 1.5 * peak(10_000)
