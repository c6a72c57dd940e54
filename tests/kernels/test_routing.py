"""From slots to rows and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError
from loadmaster.kernels.routing import (
    combine,
    combine_rows,
    sort_by_slot,
)

NAN = float("nan")


class TestSortBySlot:
    @settings(deadline=None)
    @given(st.lists(st.integers(-2, 6), max_size=60), st.sampled_from([torch.int32, torch.int64]))
    def test_is_the_stable_order_of_what_is_kept(
        self, slots: list[int], dtype: torch.dtype
    ) -> None:
        slot_TK = torch.tensor(slots, dtype=dtype).view(-1, 1)
        order, count, row = sort_by_slot(slot_TK, 7)
        expected = [i for i in np.argsort(slots, kind="stable") if slots[i] >= 0]
        assert order.tolist() == expected
        assert count.tolist() == [slots.count(s) for s in range(7)]
        assert torch.equal(row.flatten()[order], torch.arange(len(order)))
        assert (row.flatten()[slot_TK.flatten() < 0] == -1).all()

    def test_refuses_slots_that_are_not_whole(self) -> None:
        with pytest.raises(InputError, match=r"slots are torch\.float32; they must be integers"):
            sort_by_slot(torch.tensor([[0.5]]), 1)

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
