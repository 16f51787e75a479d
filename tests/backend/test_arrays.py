"""What NumPy and JAX do not have in common."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreml.backend.arrays import sums_by


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 0, 7), (2, 0)])
def test_sums_by_index(shape):
    rng = np.random.default_rng(0)
    values = rng.normal(size=shape)
    index = rng.integers(0, 4, shape[-1]).astype(np.int32)
    wanted = np.stack([np.sum(values[..., index == k], axis=-1) for k in range(5)], axis=-1)
    np.testing.assert_allclose(sums_by(values, index, 5), wanted)
    with jax.enable_x64(True):
        found = sums_by(jnp.asarray(values), index, 5)
    assert isinstance(found, jax.Array)
    np.testing.assert_allclose(found, wanted)
