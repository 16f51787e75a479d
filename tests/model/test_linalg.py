"""Small matrices against NumPy, their derivatives, and that no LAPACK call has a batch on a CPU."""

from __future__ import annotations

import ast
import re
from functools import partial
from pathlib import Path

import independent
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml import Design, estimate, reml_objective, stack
from jaxreml.data.frame import covariate_frame
from jaxreml.many import crossed
from jaxreml.many.engine import BatchFitter
from jaxreml.many.passes import Passes
from jaxreml.many.programs import programs
from jaxreml.model import linalg
from jaxreml.optimum import held

close = partial(np.testing.assert_allclose, rtol=1e-7)
BATCHED = re.compile(r'@lapack_\w+.*num_batch_dims = "[^0]')


def batched_calls(program) -> list[str]:
    """LAPACK calls with a batch in a lowered program."""
    return BATCHED.findall(program.as_text())


def lowered(function, *arguments):
    return jax.jit(function).lower(*arguments)


def test_a_batched_call_would_be_seen():
    matrices = jnp.broadcast_to(jnp.eye(3), (2, 3, 3))
    for function in (jnp.linalg.cholesky, jnp.linalg.eigh, jnp.linalg.inv, jnp.linalg.qr):
        assert batched_calls(lowered(function, matrices))


def test_only_linalg_calls_lapack():
    allowed = {"block_diag", "norm"}
    package = Path(jaxreml.__file__).parent
    for path in package.rglob("*.py"):
        if path.parent.name == "linalg":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in (
                "jax.scipy.linalg",
                "jax.numpy.linalg",
                "jax.lax.linalg",
            ):
                assert {alias.name for alias in node.names} <= allowed, path
            if isinstance(node, ast.Attribute):
                name = ast.unparse(node)
                if name.startswith(("jnp.linalg.", "jax.lax.linalg.", "jax.scipy.linalg.")):
                    assert node.attr in allowed, f"{path}: {name}"


def everything(symmetric, general, tall, right):
    """All functions, of matrices with or without lanes."""
    symmetric = (symmetric + linalg.transpose(symmetric)) / 2
    factor = linalg.cholesky(symmetric)
    basis, triangle = linalg.qr(tall)
    values, vectors = linalg.eigh(symmetric)
    return {
        "cholesky": factor,
        "lower": linalg.solve_lower(factor, right),
        "transposed": linalg.solve_lower(factor, right, transposed=True),
        "upper": linalg.solve_upper(triangle, right),
        "definite": linalg.inverse(symmetric, True),
        "inverse": linalg.inverse(general, False)[0],
        "values": values,
        "squares": vectors * vectors,
        "projection": linalg.matmul(basis, linalg.transpose(basis)),
    }


def matrices(k: int, *lanes: int) -> list[np.ndarray]:
    rng = np.random.default_rng(k)
    wide = rng.normal(size=(k, k + 4, *lanes))
    symmetric = np.einsum("ij...,kj...->ik...", wide, wide)
    general = rng.normal(size=(k, k, *lanes))
    return [symmetric, general, np.swapaxes(wide, 0, 1), rng.normal(size=(k, 2, *lanes))]


def of_numpy(symmetric, general, tall, right):
    factor = np.linalg.cholesky(symmetric)
    basis, triangle = np.linalg.qr(tall)
    values, vectors = np.linalg.eigh(symmetric)
    return {
        "cholesky": factor,
        "lower": np.linalg.solve(factor, right),
        "transposed": np.linalg.solve(factor.T, right),
        "upper": np.linalg.solve(triangle, right),
        "definite": (np.linalg.inv(symmetric), np.linalg.slogdet(symmetric)[1]),
        "inverse": np.linalg.inv(general),
        "values": values,
        "squares": vectors**2,
        "projection": basis @ basis.T,
    }


def total(*arguments):
    """A number that has all of `everything`, and less of the larger ones."""
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(everything(*arguments)))


# Unrolled, with pivots and without; LAPACK one at a time.
@pytest.mark.parametrize("k", [2, 6, 10])
def test_equal_numpy_alone_in_lanes_and_mapped(k):
    arguments = matrices(k, 3)
    program = lowered(everything, *arguments)
    in_lanes = program.compile()(*arguments)
    first = [np.moveaxis(array, -1, 0) for array in arguments]
    mapped_program = lowered(jax.vmap(everything), *first)
    mapped = mapped_program.compile()(*first)
    alone = jax.jit(everything)
    for lane in range(3):
        own = [array[..., lane] for array in arguments]
        expected = of_numpy(*own)
        for found in (
            alone(*own),
            jax.tree.map(lambda leaf: leaf[..., lane], in_lanes),  # noqa: B023
            jax.tree.map(lambda leaf: leaf[lane], mapped),  # noqa: B023
        ):
            jax.tree.map(
                partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-10), found, expected
            )
    assert not batched_calls(program) and not batched_calls(mapped_program)


@pytest.mark.parametrize("k", [2, 10])
def test_derivatives_by_differences_and_mapped(k):
    first = [np.moveaxis(array, -1, 0) for array in matrices(k, 2)]
    rng = np.random.default_rng(0)
    along = [rng.normal(size=array.shape) for array in first]

    def of_one(*arguments):
        """Gradient, its derivative along the second half, the same with the order reversed."""
        at, along = arguments[:4], arguments[4:]
        gradient = jax.grad(total, argnums=(0, 1, 2, 3))
        value, moved = jax.jvp(gradient, at, along)
        slope = jax.grad(lambda *at: jax.jvp(total, at, along)[1], argnums=(0, 1, 2, 3))
        return value, moved, slope(*at)

    program = lowered(jax.vmap(of_one), *first, *along)
    assert not batched_calls(program)
    gradient, moved, reversed_order = program.compile()(*first, *along)
    jax.tree.map(partial(close, atol=1e-7), moved, reversed_order)
    values = jax.jit(jax.vmap(total))
    ends = [
        [array + step * direction for array, direction in zip(first, along, strict=True)]
        for step in (1e-6, -1e-6)
    ]
    slope = (values(*ends[0]) - values(*ends[1])) / 2e-6
    expected = sum(np.sum(g * d, axis=(1, 2)) for g, d in zip(gradient, along, strict=True))
    np.testing.assert_allclose(expected, slope, rtol=1e-5)
    gradients = jax.jit(jax.vmap(jax.grad(total, argnums=(0, 1, 2, 3))))
    for bend, above, below in zip(moved, gradients(*ends[0]), gradients(*ends[1]), strict=True):
        scale = np.abs(bend).max()
        np.testing.assert_allclose(bend / scale, (above - below) / 2e-6 / scale, atol=1e-5)


def test_not_positive_definite_is_nan():
    for matrix in (-jnp.eye(3), -jnp.eye(3)[..., None] * jnp.ones(2), -jnp.eye(9)[..., None]):
        assert jnp.isnan(linalg.cholesky(matrix)[-1, -1]).all()


# Whole programs, as they are lowered


def design_of(structure: str, p: int = 2, seed: int = 0) -> Design:
    y, X, codes, Z = independent.simulate(seed)
    more = np.random.default_rng(1).normal(size=(y.size, p - 2))
    terms = [(codes, Z)]
    if structure != "grouped":
        terms.append(np.arange(y.size) % 7)
    return Design.from_arrays(y, np.concatenate([X, more], axis=1), terms, structure=structure)


@pytest.mark.parametrize("structure", ["grouped", "dense", "crossed"])
def test_research_code_has_no_batched_calls(structure):
    design = design_of(structure, p=10)
    designs = stack([design, design])
    params = np.zeros((3, len(design.parameter_names)))
    slopes = jax.grad(lambda design: estimate(design).criterion, allow_int=True)
    # ... nor does it leave ranks and types to be guessed, where a user has JAX refuse that.
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        programs = [
            lowered(jax.vmap(jax.hessian(reml_objective), (0, None)), params, design),
            lowered(jax.vmap(slopes), designs),
        ]
    assert not any(batched_calls(program) for program in programs)


def test_traced_columns_have_no_batched_calls():
    y, X, codes, _ = independent.simulate(0)

    def criterion(X):
        return estimate(Design.from_arrays(y, X, [codes])).criterion

    stacked = np.stack([X, X + 0.1 * np.sin(np.arange(X.size)).reshape(X.shape)])
    assert not batched_calls(lowered(jax.vmap(criterion), stacked))
    gradients = jax.jit(jax.vmap(jax.grad(criterion)))(stacked)
    step = 1e-5 * np.cos(np.arange(X.size)).reshape(X.shape)
    values = jax.jit(jax.vmap(criterion))
    slope = (values(stacked + step) - values(stacked - step)) / 2
    np.testing.assert_allclose(np.sum(gradients * step, axis=(1, 2)), slope, rtol=1e-5)


@pytest.mark.parametrize(
    ("formula", "df", "structure"),
    [
        ("~ x0 + x1 + (1 | g)", "satterthwaite", None),
        ("~ x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7 + (x0 | g)", "kenward-roger", None),
        ("~ x0 + (1 | g) + (1 | h)", "kenward-roger", "dense"),
    ],
)
def test_fit_many_has_no_batched_calls(formula, df, structure):
    rng = np.random.default_rng(0)
    data = pd.DataFrame(rng.normal(size=(60, 8)), columns=[f"x{k}" for k in range(8)])
    data["g"], data["h"] = np.arange(60) // 4, np.arange(60) % 5
    fitter = BatchFitter(
        covariate_frame(formula, data), df=df, structure=structure, lanes=2, engine="jax"
    )
    values = rng.normal(size=(60, 4))
    pattern = Passes(fitter.engine, values, 4, None, None)
    pattern.lanes = pattern.size = 4
    block, shift = pattern._block(np.arange(4))
    for careful in (False, True):
        compiled = programs(fitter.engine.mesh, pattern.plan._replace(careful=careful))
        begin = compiled.begin.lower(pattern.shared, block, shift)
        reduced, root, radius = begin.out_info
        climb = compiled.climb.lower(pattern.shared, reduced, root, radius, np.int32(9))
        before = np.zeros(4, np.int32)
        rows = fitter.options.contrasts, fitter.options.parts
        found = climb.out_info
        conclude = compiled.conclude.lower(pattern.shared, reduced, found, before, *rows)
        modes = compiled.modes.lower(pattern.shared, block, shift, root)
        for program in (begin, climb, conclude, modes):
            assert not batched_calls(program)


def test_crossed_refits_have_no_batched_calls():
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"x": rng.normal(size=60), "g": np.arange(60) // 4, "h": np.arange(60) % 5})
    frame = covariate_frame("~ x + (x | g) + (x | h)", data)
    rows = BatchFitter(frame).engine
    assert isinstance(rows, crossed.CrossedEngine)
    lanes = rows.basis.response(rng.normal(size=(60, 3)))
    compiled = crossed._programs(True, "kenward-roger", 100)
    fits = compiled.estimate.lower(rows.design, lanes)
    certify = compiled.certify.lower(
        rows.design, lanes, fits.out_info, np.zeros((0, 2)), rows.options.parts, rows.design
    )
    modes = compiled.modes.lower(rows.design, lanes, fits.out_info)
    slopes = crossed._gradient_program(True).lower(rows.design, np.zeros(7), lanes)
    for program in (fits, certify, modes, slopes):
        assert not batched_calls(program)


def test_profiles_have_no_batched_calls(monkeypatch):
    data = jaxreml.datasets.load("penicillin")
    formula = "diameter ~ 1 + (1 | plate) + (1 | sample)"
    fit = jaxreml.fit(formula, data, structure="dense", engine="jax")
    found = []

    class Lowered(Exception):
        """The programs are known; they need not be compiled."""

    class Compilers:
        def __init__(self, count):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def map(self, _, programs):
            found.extend(programs)
            raise Lowered

    monkeypatch.setattr(held, "ThreadPoolExecutor", Compilers)
    monkeypatch.setattr(held, "_programs", held._programs.__wrapped__)
    with pytest.raises(Lowered):
        fit.conf_int(method="profile")
    assert len(found) == 2 and "lapack_dsyevd" in found[0].as_text()  # `newton` asks for it
    assert not any(batched_calls(program) for program in found)


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("k", [1, 5, 150, 300])
def test_inverse_of_a_factor_and_symmetric_sums(xp, k):
    rng = np.random.default_rng(k)
    triangle = np.tril(rng.normal(size=(k, k))) / k + np.eye(k)
    definite = triangle @ triangle.T
    factor = linalg.cholesky(xp.asarray(definite))
    close(factor, triangle, atol=1e-10)
    close(linalg.inverse_of_factor(factor) @ definite, np.eye(k), atol=1e-9)
    close(linalg.mirrored(xp.array(triangle)), triangle + triangle.T)
    close(linalg.plus_identity(xp.array(definite)), definite + np.eye(k))
    right = rng.normal(size=(k, 3))
    for transposed in (False, True):
        solved = linalg.solve_lower(factor, xp.asarray(right), transposed)
        close((triangle.T if transposed else triangle) @ solved, right, atol=1e-9)
