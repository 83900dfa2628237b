import warnings

import numpy as np
import pytest

from ddpm_jax import diffusion


def quiet_plan(T, S, spacing):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return diffusion.timestep_plan(T, S, spacing)


@pytest.mark.parametrize("spacing", diffusion.SPACINGS)
@pytest.mark.parametrize("T", [1, 2, 3, 7, 30, 101, 1000, 4000])
def test_every_number_of_steps_gives_that_many_distinct_falling_steps(T, spacing):
    lowest = 1 if spacing == "trailing" or T == 1 else 2
    counts = range(lowest, T + 1) if T < 1000 else {*range(lowest, 60), 97, 100, 250, 300, 333, 667, T - 1, T}
    for S in counts:
        t, t_prev = quiet_plan(T, S, spacing)
        assert t.dtype == t_prev.dtype == np.int32
        assert t.shape == t_prev.shape == (S,)
        assert (np.diff(t) < 0).all(), (T, S)
        assert t[0] < T, (T, S)
        assert t[-1] >= 0, (T, S)
        np.testing.assert_array_equal(t_prev, [*t[1:], -1])


@pytest.mark.parametrize("spacing", diffusion.SPACINGS)
@pytest.mark.parametrize("T", [1, 2, 50, 1000])
def test_all_the_steps_are_the_whole_chain(T, spacing):
    np.testing.assert_array_equal(quiet_plan(T, T, spacing)[0], np.arange(T)[::-1])


@pytest.mark.parametrize(("T", "S"), [(1000, 10), (1000, 37), (1000, 300), (101, 101), (64, 7)])
def test_each_formula_in_python_integers_and_floats(T, S):
    def rounded(numerator, denominator):  # exact, half to even, as numpy rounds
        quotient, rest = divmod(numerator, denominator)
        up = 2 * rest > denominator or (2 * rest == denominator and quotient % 2 == 1)
        return quotient + up

    assert quiet_plan(T, S, "leading")[0].tolist() == [i * (T // S) for i in range(S)][::-1]
    assert quiet_plan(T, S, "trailing")[0].tolist() == [rounded(T * S - i * T, S) - 1 for i in range(S)]
    assert quiet_plan(T, S, "linspace")[0].tolist() == [rounded(i * (T - 1), S - 1) for i in range(S)][::-1]
    steps = []
    for i in range(
        S
    ):  # floor((i sqrt(.8 T) / (S - 1))^2) = floor(.8 T i^2 / (S - 1)^2), each moved past the one before
        steps.append(max(8 * T * i * i // (10 * (S - 1) ** 2), steps[-1] + 1 if steps else 0))
    assert quiet_plan(T, S, "quadratic")[0].tolist() == steps[::-1]


def test_tables_of_the_existing_implementations():  # peers.md 4.4, T = 1000
    def table(S, spacing):
        return diffusion.timestep_plan(1000, S, spacing)[0].tolist()[::-1]

    assert table(10, "leading") == list(range(0, 1000, 100))
    assert table(50, "leading") == list(range(0, 1000, 20))
    assert table(10, "trailing") == list(range(99, 1000, 100))
    assert table(50, "trailing") == list(range(19, 1000, 20))
    assert table(10, "linspace") == list(range(0, 1000, 111))
    assert table(50, "linspace")[:3] == [0, 20, 41]
    assert table(50, "linspace")[-1] == 999
    assert table(10, "quadratic")[:2] == [0, 9]
    assert table(10, "quadratic")[-1] == 800
    for S, unique in ((50, 49), (100, 96), (300, 272)):  # what rounding down alone would leave
        plain = np.floor(np.linspace(0, np.sqrt(800), S) ** 2).astype(int)
        assert len(set(plain.tolist())) == unique
        ours = table(S, "quadratic")
        assert len(set(ours)) == S
        assert all(a >= b for a, b in zip(ours, plain, strict=True))
        assert ours[-1] == 800


@pytest.mark.parametrize("spacing", ["leading", "linspace", "quadratic"])
def test_one_step_is_for_trailing_only(spacing):
    with pytest.raises(ValueError, match="use trailing"):
        diffusion.timestep_plan(1000, 1, spacing)
    t, t_prev = diffusion.timestep_plan(1000, 1, "trailing")
    assert (t.tolist(), t_prev.tolist()) == ([999], [-1])


@pytest.mark.parametrize("spacing", diffusion.SPACINGS)
@pytest.mark.parametrize("S", [0, -3, 101])
def test_impossible_numbers_of_steps_are_refused(S, spacing):
    with pytest.raises(ValueError, match=rf"num_steps={S}: must lie in 1 \.\. 100"):
        diffusion.timestep_plan(100, S, spacing)


def test_unknown_spacing():
    with pytest.raises(ValueError, match=r"'uniform'.*leading, trailing, linspace, quadratic"):
        diffusion.timestep_plan(100, 10, "uniform")


def test_leading_warns_exactly_where_it_starts_below_nine_tenths():
    for S in range(2, 101):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            t, _ = diffusion.timestep_plan(100, S, "leading")
        assert len(caught) == (t[0] < 90), (S, t[0])
        if caught:
            assert caught[0].category is diffusion.ScheduleWarning
            assert "use trailing" in str(caught[0].message)
            assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for spacing in ("trailing", "linspace", "quadratic"):
            diffusion.timestep_plan(100, 7, spacing)
        diffusion.timestep_plan(5, 5, "leading")  # t = 4 of 5 is the whole chain
