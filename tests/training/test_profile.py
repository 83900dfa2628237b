"""Which steps a trace holds."""

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax import training


def traced_steps(folder) -> list[int]:
    """The numbers of the training steps that a trace knows of."""
    numbers = set()
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    numbers |= {value for name, value in event.stats if name == "step_num" and event.name == "train"}
    return sorted(numbers)


@pytest.mark.parametrize(
    ("first", "steps", "enabled", "expected"),
    [(3, 2, True, [3, 4]), (5, 9, True, [5, 6]), (3, 2, False, []), (1, 0, True, [])],
)
def test_the_steps_that_were_asked_for(tmp_path, first, steps, enabled, expected):
    double = jax.jit(lambda x: 2 * x)
    x = jnp.ones(3)
    with training.Profile(str(tmp_path / "profile"), first=first, steps=steps, enabled=enabled) as profile:
        for step in range(1, 7):
            with profile.step(step, x):
                x = double(x)
    assert traced_steps(tmp_path) == expected
    assert (tmp_path / "profile").exists() == bool(expected)
    assert x[0] == 2**6


def test_a_trace_is_ended_by_an_error(tmp_path):
    for folder in ("first", "second"):  # a second trace cannot start while one runs
        with (
            pytest.raises(ZeroDivisionError),
            training.Profile(str(tmp_path / folder), first=1, steps=5, enabled=True) as profile,
            profile.step(1, None),
        ):
            raise ZeroDivisionError
        assert list((tmp_path / folder).rglob("*.xplane.pb"))
