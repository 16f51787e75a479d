"""Which library works on a fit: NumPy, where nothing has to be compiled, or JAX.

They run the same source. NumPy needs derivatives that are written out: a covariance of one's own
may have none. Few effects of several factors take one matrix on NumPy, which is quicker there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxreml.arguments import is_reml
from jaxreml.backend.compilation import quick_jit, remembered, spare_memory_maps
from jaxreml.backend.lazy import jax
from jaxreml.backend.runtime import neutral
from jaxreml.backend.threads import suited_blas
from jaxreml.data.frame import ModelFrame
from jaxreml.model.design import Design
from jaxreml.model.penalties import Penalty
from jaxreml.optimum.effects import Inspection, inspect, inspect_on_host
from jaxreml.optimum.estimate import estimate, estimate_on_host
from jaxreml.optimum.report import Estimate
from jaxreml.optimum.rivals import is_proved

FEW = 150  # random effects of several factors up to which they take one matrix


def suited_structure(frame: ModelFrame, asked: str | None, engine: str | None) -> str | None:
    """The structure asked for, or one that NumPy can work with; None to have it chosen."""
    factors: set[str | None] = {term.name for term in frame.terms}
    effects = sum(len(term.levels) * len(term.effect_names) for term in frame.terms)
    if frame.residual is not None:  # which has an effect for every row
        factors.add(frame.residual.words.subject)
        effects += len(frame.X)
    if asked is not None or engine == "jax" or len(factors) < 2 or frame.kernels:
        return asked
    return "dense" if effects <= FEW else None


def numbers_of(frame: ModelFrame) -> int:
    """How many numbers a design is made from; a kernel, which is decomposed, counts eight times."""
    kernels = [len(term.seen) for term in frame.terms if term.kernel is not None]
    return frame.X.size + 8 * sum(order**2 for order in kernels)


def engine_for(design: Design, asked: str | None) -> str:
    """The engine that a design gets.

    Raises:
        ValueError: "numpy" is asked for and cannot.
    """
    if design.written_out:
        return asked or "numpy"
    if asked == "numpy":
        raise ValueError('engine="numpy" has no derivatives of this covariance: leave engine out')
    return "jax"


def optimum(
    design: Design,
    method: str,
    max_iterations: int,
    engine: str,
    penalty: Penalty | None = None,
) -> tuple[Estimate, Inspection, bool]:
    """Estimate and inspection of a design without names, as NumPy arrays, and if it `is_proved`."""
    if engine == "numpy":
        with suited_blas(design.numbers):
            estimated, proved = estimate_on_host(
                design, method, penalty=penalty, max_iterations=max_iterations
            )
            return estimated, inspect_on_host(estimated, design, method, penalty), proved
    spare_memory_maps()
    with neutral():
        with_it = {} if penalty is None else {"penalty": penalty}
        program = _compiled(estimate, method, max_iterations=max_iterations, **with_it)
        estimated = program(design)
        inspection = _compiled(inspect, method, **with_it)(estimated, design)
        estimated, inspection = jax.device_get((estimated, inspection))
    if penalty is not None:
        return estimated, inspection, False
    return estimated, inspection, is_proved(design, inspection.omega, reml=is_reml(method))


@remembered
def _compiled(function: Callable[..., Any], method: str, **options: Any) -> Callable[..., Any]:
    """`function` of arrays, jitted so that it compiles quickly."""
    return quick_jit(lambda *arrays: function(*arrays, method, **options))
