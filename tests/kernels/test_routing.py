"""From chosen experts to slots, rows and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError
from loadmaster.kernels.routing import (
    assign_slots,
    combine,
    combine_rows,
    histogram,
    sort_by_slot,
    sort_rows,
)

NAN = float("nan")


class TestHistogram:
    @settings(deadline=None)
    @given(
        st.lists(st.lists(st.integers(-3, 12), min_size=3, max_size=3), min_size=1, max_size=40),
        st.sampled_from([torch.int32, torch.int64]),
    )
    def test_counts_what_lies_inside_and_nothing_else(
        self, rows: list[list[int]], dtype: torch.dtype
    ) -> None:
        ids = torch.tensor(rows, dtype=dtype)
        expected = [sum(row.count(e) for row in rows) for e in range(10)]
        assert histogram(ids, 10).tolist() == expected

    def test_no_tokens_count_nothing(self) -> None:
        assert histogram(torch.empty(0, 4, dtype=torch.int64), 3).tolist() == [0, 0, 0]


class TestAssignSlots:
    def test_fills_an_experts_slots_in_token_order(self) -> None:
        ids = torch.tensor([[0, 1], [1, 0], [0, 1]])
        slot_expert = torch.tensor([1, 0, -1, 0, 1])
        quota = torch.tensor([2, 1, 0, 2, 1])
        assert assign_slots(ids, quota, slot_expert).tolist() == [[1, 0], [0, 3], [3, 4]]

    @settings(deadline=None)
    @given(st.data())
    def test_every_quota_is_met_and_every_expert_kept(self, data: st.DataObject) -> None:
        experts, slots = data.draw(st.integers(1, 6)), data.draw(st.integers(6, 14))
        table = list(range(experts)) + data.draw(
            st.lists(
                st.integers(-1, experts - 1), min_size=slots - experts, max_size=slots - experts
            )
        )
        ids = torch.tensor(
            data.draw(
                st.lists(
                    st.lists(st.integers(-1, experts), min_size=2, max_size=2), max_size=30
                )
            ),
            dtype=torch.int64,
        ).view(-1, 2)
        seed = data.draw(st.integers(0, 1000))
        quota = _random_quota(ids, table, experts, seed)
        slot = assign_slots(ids, quota, torch.tensor(table), num_experts=experts)
        inside = (ids >= 0) & (ids < experts)
        assert torch.equal(slot >= 0, inside)
        assert torch.equal(torch.tensor(table)[slot[inside]], ids[inside])
        assert torch.equal(histogram(slot, slots), quota)
        for expert in range(experts):
            in_token_order = slot.flatten()[ids.flatten() == expert]
            assert torch.equal(in_token_order, in_token_order.sort().values)

    @pytest.mark.parametrize("quota", [[1, 1], [2, 2], [3, 0], [0, 0]])
    def test_refuses_quotas_that_do_not_match(self, quota: list[int]) -> None:
        with pytest.raises(InputError, match="compute the quotas from these ids"):
            assign_slots(torch.tensor([[0], [0], [1]]), torch.tensor(quota), torch.tensor([0, 1]))

    def test_refuses_an_expert_without_a_slot(self) -> None:
        with pytest.raises(InputError, match="expert 1 has 1 assignments but quotas for 0"):
            assign_slots(torch.tensor([[1]]), torch.tensor([0, 0, 0]), torch.tensor([0, -1, 2]))

    @pytest.mark.parametrize("expert", [5, 10**13, 2**63 - 1])
    def test_refuses_ids_past_the_table(self, expert: int) -> None:
        """Whatever the id: nothing of its size is ever allocated."""
        ids, table = torch.tensor([[expert]]), torch.tensor([0])
        with pytest.raises(InputError, match=f"id {expert} is past the slot table's 1 experts"):
            assign_slots(ids, torch.tensor([1]), table)
        none = torch.tensor([0])
        assert assign_slots(ids, none, table, num_experts=1).tolist() == [[-1]]

    def test_refuses_numbers_that_are_not_whole(self) -> None:
        ids, table = torch.tensor([[0.5]]), torch.tensor([0])
        with pytest.raises(InputError, match="must be integers"):
            assign_slots(ids, torch.tensor([1]), table)
        with pytest.raises(InputError, match=r"quotas are torch\.float32"):
            assign_slots(ids.long(), torch.tensor([1.0]), table)
        with pytest.raises(InputError, match="ids are"):
            histogram(ids, 1)
        with pytest.raises(InputError, match="slots are"):
            sort_rows(ids, 1)

    def test_refuses_quota_on_an_empty_slot(self) -> None:
        ids = torch.tensor([[0]])
        with pytest.raises(InputError, match="slot 1 has a quota of 1 but holds expert -1 of 1"):
            assign_slots(ids, torch.tensor([1, 1]), torch.tensor([0, -1]))
        with pytest.raises(InputError, match="slot 1 has a quota of 3 but holds expert 5 of 2"):
            assign_slots(ids, torch.tensor([1, 3]), torch.tensor([0, 5]), num_experts=2)
        with pytest.raises(InputError, match="slot 0 has a quota of -1 but holds expert 0 of 2"):
            assign_slots(ids, torch.tensor([-1, 2]), torch.tensor([0, 1]))


class TestSortBySlot:
    @settings(deadline=None)
    @given(st.lists(st.integers(-2, 6), max_size=60), st.sampled_from([torch.int32, torch.int64]))
    def test_is_the_stable_order_of_what_is_kept(
        self, slots: list[int], dtype: torch.dtype
    ) -> None:
        slot_TK = torch.tensor(slots, dtype=dtype).view(-1, 1)
        order, count, row = sort_rows(slot_TK, 7)
        expected = [i for i in np.argsort(slots, kind="stable") if slots[i] >= 0]
        assert order.tolist() == expected
        assert count.tolist() == [slots.count(s) for s in range(7)]
        assert torch.equal(row.flatten()[order], torch.arange(len(order)))
        assert (row.flatten()[slot_TK.flatten() < 0] == -1).all()
        assert all(map(torch.equal, sort_by_slot(slot_TK, 7), (order, count)))

    def test_refuses_a_slot_past_the_table(self) -> None:
        with pytest.raises(InputError, match="slot 7 is past the table of 7 slots"):
            sort_by_slot(torch.tensor([[0, 7]]), 7)


class TestCombine:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize(("tokens", "choices", "hidden"), [(0, 2, 8), (5, 1, 33), (9, 4, 64)])
    def test_is_the_weighted_sum(
        self, dtype: torch.dtype, tokens: int, choices: int, hidden: int
    ) -> None:
        generator = torch.Generator().manual_seed(hidden)
        y = torch.randn(tokens, choices, hidden, generator=generator).to(dtype)
        gate = torch.rand(tokens, choices, generator=generator)
        out = combine(y, gate)
        assert out.dtype == dtype
        expected = (y.double() * gate.double()[..., None]).sum(1)
        torch.testing.assert_close(
            out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6
        )

    def test_adds_choices_in_order_in_float32(self) -> None:
        """Big, minus big, small: any other order loses the small one differently."""
        y = torch.tensor([[[1e8], [-1e8], [1.0]], [[1.0], [1e8], [-1e8]]])
        assert combine(y, torch.ones(2, 3)).flatten().tolist() == [1.0, 0.0]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_token_does_not_depend_on_the_others(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(3)
        y = torch.randn(50, 4, 37, generator=generator).to(dtype)
        gate = torch.rand(50, 4, generator=generator)
        whole = combine(y, gate)
        for t in range(50):
            assert torch.equal(combine(y[t : t + 1], gate[t : t + 1])[0], whole[t])

    def test_rows_may_lie_anywhere_and_left_out_ones_are_not_read(self) -> None:
        y = torch.tensor([[1.0, 2.0], [NAN, NAN], [10.0, 20.0]])
        rows, gate = torch.tensor([[2, 0], [-1, 0]]), torch.tensor([[0.5, 1.0], [NAN, 2.0]])
        assert combine_rows(y, rows, gate).tolist() == [[6.0, 12.0], [2.0, 4.0]]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_nan_and_infinity_stay_in_their_token(self, dtype: torch.dtype) -> None:
        y = torch.ones(3, 1, 4, dtype=dtype)
        y[1, 0, 2], y[2, 0, 0] = NAN, torch.inf
        out = combine(y, torch.ones(3, 1))
        assert out[0].isfinite().all()
        assert out[1].isnan().tolist() == [False, False, True, False]
        assert out[2].isinf().tolist() == [True, False, False, False]

    def test_refuses_shapes_that_do_not_match(self) -> None:
        with pytest.raises(InputError, match=r"y \[T, K, H\] and gates \[T, K\]"):
            combine(torch.zeros(2, 3, 4), torch.zeros(2, 2))
        with pytest.raises(InputError, match="past the 2 rows of y"):
            combine_rows(torch.zeros(2, 4), torch.tensor([[2]]), torch.ones(1, 1))
        for dtype in (torch.float32, torch.float64):
            y, gate = torch.ones(2, 8, dtype=dtype), torch.ones(2, 1)
            with pytest.raises(InputError, match="row 7 is past the 2 rows of y"):
                combine_rows(y, torch.full((2, 1), 7), gate)
            with pytest.raises(InputError, match="rows are"):
                combine_rows(y, torch.full((2, 1), 0.7), gate)
        with pytest.raises(InputError, match="out is"):
            combine(torch.zeros(2, 3, 4), torch.zeros(2, 3), out=torch.zeros(2, 5))


def _random_quota(
    ids: torch.Tensor, table: list[int], experts: int, seed: int
) -> torch.Tensor:
    """Quotas that cut every expert's tokens over its slots at random."""
    generator = torch.Generator().manual_seed(seed)
    quota = torch.zeros(len(table), dtype=torch.int64)
    for expert in range(experts):
        slots = [s for s, e in enumerate(table) if e == expert]
        for _ in range(int((ids == expert).sum())):
            pick = int(torch.randint(len(slots), (1,), generator=generator))
            quota[slots[pick]] += 1
    return quota
