import warnings

import jax
import numpy as np
import pytest
from gaussian import affine, alpha_bars64, chain, denoiser, noises

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


def test_an_offset_shifts_leading_and_nothing_else():
    t, t_prev = quiet_plan(1000, 10, "leading")
    shifted = diffusion.timestep_plan(1000, 10, "leading", offset=7)
    np.testing.assert_array_equal(shifted[0], t + 7)
    np.testing.assert_array_equal(shifted[1], [*(t_prev[:-1] + 7), -1])
    assert shifted[0].dtype == shifted[1].dtype == np.int32
    assert diffusion.timestep_plan(1000, 10, "leading", offset=99)[0][0] == 999
    with pytest.raises(ValueError, match=r"steps_offset=100: must lie in 0 \.\. 99"):
        diffusion.timestep_plan(1000, 10, "leading", offset=100)
    with pytest.raises(ValueError, match=r"steps_offset=1: must lie in 0 \.\. 0, .*fewer steps"):
        diffusion.timestep_plan(1000, 1000, "leading", offset=1)
    with pytest.raises(ValueError, match="steps_offset=-1"):
        diffusion.timestep_plan(1000, 10, "leading", offset=-1)
    for spacing in set(diffusion.SPACINGS) - {"leading"}:
        with pytest.raises(ValueError, match=f"steps_offset=1: spacing '{spacing}' has none"):
            diffusion.timestep_plan(1000, 10, spacing, offset=1)


@pytest.mark.parametrize("spacing", diffusion.SPACINGS)
def test_the_other_end_is_the_first_noise_level(spacing):
    clean, first = quiet_plan(100, 10, spacing), diffusion.timestep_plan(100, 10, spacing, end="first")
    np.testing.assert_array_equal(first[0], clean[0])
    np.testing.assert_array_equal(first[1], [*clean[1][:-1], 0])
    with pytest.raises(ValueError, match=r"sampling\.end='last': choose one of clean, first"):
        diffusion.timestep_plan(100, 10, spacing, end="last")


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("rederive", [True, False])
def test_a_chain_to_the_first_noise_level_is_the_float64_recursion(spacing, rederive):
    """With leading the last step goes from t = 0 to itself: clipped x0 and eps are put together again."""
    alpha_bars = alpha_bars64("linear", 100)
    schedule, network = diffusion.make_schedule("linear", num_timesteps=100), denoiser("eps", alpha_bars, s=2.0)
    x_T = np.random.default_rng(0).normal(size=(4, 3, 2, 1)).astype(np.float32)
    plan, key = diffusion.timestep_plan(100, 10, spacing, end="first"), jax.random.key(0)
    assert (plan[0][-1] == plan[1][-1]) == (spacing == "leading")
    for eta in (0.0, 1.0):
        x0 = diffusion.sample(network, schedule, x_T, key, plan=plan, eta=eta, rederive_eps=rederive)
        options = {"prediction": "eps", "method": "ddim", "eta": eta, "clip": (-1.0, 1.0), "rederive": rederive}
        noise = noises(key, plan[0], x_T.shape)
        expected, _, _ = chain(alpha_bars, x_T, plan, noise, affine("eps", alpha_bars, 0.3, 2.0), **options)
        np.testing.assert_allclose(x0, expected, atol=1e-4)
    clean = diffusion.sample(network, schedule, x_T, key, plan=(plan[0], np.append(plan[0][1:], -1)))
    assert np.abs(clean - expected).max() > 1e-3


def test_only_the_step_from_0_may_stay_where_it_is():
    schedule = diffusion.make_schedule("linear", num_timesteps=100)
    for t, t_prev in (([50], [50]), ([50, 3], [3, 3]), ([0], [1])):
        with pytest.raises(ValueError, match=r"or t_prev = t = 0"):
            diffusion.sample(lambda x, t: x, schedule, np.zeros((1, 2, 2, 1)), jax.random.key(0), plan=(t, t_prev))


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
