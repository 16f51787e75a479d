"""`Design`: one data set and one model, reduced to the cross-products that its likelihood needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from jaxreml.backend.arrays import among, leaves, mapped, namespace, on_host
from jaxreml.backend.lazy import jax, jnp, record
from jaxreml.backend.runtime import require_own_threads, usual_arithmetic
from jaxreml.errors import DataError, PrecisionError
from jaxreml.kernels.known import require_covariance
from jaxreml.model import linalg
from jaxreml.model.arrays import (
    ENABLE_X64,
    Term,
    floating_type,
    is_traced,
    listed_terms,
    read_rows,
    read_terms,
    row_vector,
    widest_type,
)
from jaxreml.model.basis import Basis, first_of
from jaxreml.model.covariance import natural
from jaxreml.model.covariance.joint import Covariance
from jaxreml.model.moments import of_moments
from jaxreml.model.response import Response
from jaxreml.model.structures import Full, Grouped
from jaxreml.model.structures.collapse import fewer_levels
from jaxreml.model.units import Units
from jaxreml.status import Status

Array = Any  # NumPy's or JAX's

# What can be the matter with data that cannot be refused, the worst first.
TROUBLES = (
    Status.BAD_WEIGHTS,
    Status.BAD_LEVELS,
    Status.NOT_FINITE,
    Status.BAD_KERNEL,
    Status.TOO_FEW_ROWS,
    Status.RANK_DEFICIENT,
    Status.CONSTANT,
    Status.ILL_CONDITIONED,
)
UNUSABLE = (Status.BAD_LEVELS, Status.NOT_FINITE, Status.BAD_KERNEL)  # with no likelihood at all


@record
@dataclass(frozen=True, repr=False)
class Design:
    """One data set and one model: a pytree, an argument of every objective and of `estimate`.

    Make one with `Design.from_arrays` or `jaxreml.design`. It holds cross-products, not rows, so
    nothing that takes a design costs more for more rows. Designs of one shape (numbers of columns,
    levels and effects, and names) share one compilation, and can be stacked for `vmap`.

    Attributes:
        structure: the factorised random effects and the projections of X and y on them.
        basis: (p, p) upper triangular, with sqrt(w) X = U basis for orthonormal U. Zero in the rows
            and columns of those columns of a traced X that depend on others before them, which
            are then left out: so are the columns of U.
        beta_ols: (p,), weighted least squares coefficients; y enters everything as its residual
            from them, which changes no likelihood and loses no digits to a large mean.
        residual_ss: (), the weighted sum of squares of that residual.
        total_ss: (), the weighted sum of squares of y less its offset.
        log_weights: (), sum of the logarithms of the prior weights; NaN, as then the criterion is,
            where traced values are not finite or traced weights not positive.
        log_gram_x: (), log|X'X| without prior weights, which Harville's restricted likelihood takes
            off; columns left out do not count.
        units: of the effects inside `structure`.
        n: number of observations.
        trouble: (), the `Status` that no fit of these data can be better than: what is an error
            of concrete arrays and cannot be one of traced arrays, and digits that cross-products
            lack (`from_moments`). CONVERGED if there is none.
        p: number of fixed effects.
        names: per term the grouping factor's name and the effects' names.
        covariance: of the random effects.
        dtype: name of the floating type everything is in.

    Examples:
        >>> design = jaxreml.design("Reaction ~ Days + (Days | Subject)", data)
        >>> design
        <Design of 180 rows, 2 fixed effects, ((Intercept), Days | Subject); grouped, ...
        >>> design.names
        (('Subject', ('(Intercept)', 'Days')),)
    """

    structure: Full
    basis: Array
    beta_ols: Array
    residual_ss: Array
    total_ss: Array
    log_weights: Array
    log_gram_x: Array
    units: Units
    n: Array | int
    trouble: Array
    p: int = field(metadata={"static": True})
    names: tuple[tuple[str, tuple[str, ...]], ...] = field(metadata={"static": True})
    covariance: Covariance = field(metadata={"static": True})
    dtype: str = field(metadata={"static": True})

    def __repr__(self) -> str:
        rows = f"{self.n} rows, " if isinstance(self.n, int) else ""
        terms = ", ".join(f"({', '.join(effects)} | {group})" for group, effects in self.names)
        kind = type(self.structure).__name__.lower()
        return f"<Design of {rows}{self.p} fixed effects, {terms}; {kind}, {self.dtype}>"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Effects per random term."""
        return self.covariance.sizes

    @property
    def written_out(self) -> bool:
        """Whether all derivatives are written out, so that NumPy can fit it."""
        blocks = self.covariance.blocks
        return self.structure.written_out and all(block.written_out for block in blocks)

    @property
    def numbers(self) -> int:
        """How many numbers an evaluation works with, which it costs by."""
        return sum(np.size(leaf) for leaf in leaves(self.structure.evaluated))

    @property
    def absent(self) -> Array:
        """(p,) booleans, which columns of X depend on those before them; none if X is concrete."""
        return linalg.diagonal(self.basis) == 0

    @property
    def rank(self) -> Array:
        """(), that of X.

        Examples:
            >>> int(jaxreml.design("Reaction ~ Days + (1 | Subject)", data).rank)
            2
        """
        return self.p - self.absent.sum(axis=0, dtype=self.dtype)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the entries of an objective's `parameters`, in order, the residual last.

        ``log_variance[g, x]`` is the log-variance of effect x of factor g; ``z[g, x1, x2]`` the
        inverse hyperbolic tangent of the (partial) correlation of x1 and x2.

        Examples:
            >>> jaxreml.design("Reaction ~ Days + (1 | Subject)", data).parameter_names
            ('log_variance[Subject, (Intercept)]', 'log_variance[Residual]')
        """
        return self.covariance.parameter_names(self.names)

    def scaled_factors(self, theta: Array) -> tuple[Array, ...]:
        """Relative Cholesky factors of scaled effects, (q_k, q_k), of those in the user's units."""
        own = natural.split_triangles(theta, self.sizes)
        return tuple(self.units.inner_factor(k, factor) for k, factor in enumerate(own))

    def omega_of_theta(self, theta: Array) -> Array:
        """Relative covariances (m,) in scaled units of `Estimate.theta`."""
        return self.covariance.omega_of_factors(self.scaled_factors(theta))

    @staticmethod
    def from_arrays(
        y: Any,
        X: Any,
        terms: Term | Sequence[Term | tuple[Any, Any] | Any],
        *,
        weights: Any = None,
        offset: Any = None,
        structure: str | None = None,
        dtype: Any = None,
    ) -> Design:
        """Reduce arrays to a design.

        Any of y, X, the effects of a term, weights, offset and kernels may be traced by JAX (an
        output of a network under `jit` or `grad`, say), and so may grouping factors with
        `Term.n_levels`: a mini-batch of other rows and groups then compiles nothing anew. Traced
        weights may be zero, which leaves rows out. Traced values cannot be refused:
        `Estimate.status` says what is the matter with them, and objectives are NaN where values are
        not finite, weights negative, codes outside their range or a kernel no covariance. Columns
        of a traced X that depend on those before them are left out (`reml_objective` says what the
        derivatives are), and REML as a loss for X has no minimum: see there.

        With a traced kernel, or with traced levels, effects or weights beside any, nothing is
        decomposed: an evaluation takes time as the cube of the number of random effects, or of the
        rows if there are fewer or if what is traced is not the kernel. Derivatives in a kernel are
        those along symmetric changes of it.

        Args:
            y: (n,) response.
            X: (n, p) fixed-effects columns of full rank, the intercept included; p may be 0.
            terms: a list of random terms: `Term`, or a pair (group labels, (n, q) effects), or
                group labels alone for a random intercept. A single `Term` needs no list.
            weights: (n,) positive prior weights as in lme4: observation i has residual variance
                sigma2 / weights[i].
            offset: (n,) known part of the mean.
            structure: "grouped" (all terms on one factor), "crossed" (any factors) or "dense" (any,
                one large matrix); chosen if left out. Traced levels, effects or weights of several
                factors need "dense", which is then chosen.
            dtype: "float32" to ask for single precision, which costs likelihoods most of their
                digits; float64 otherwise.

        Raises:
            DataError: shapes that differ, no random term, values that are not finite, weights
                that are not positive, X that is not of full rank, a term that can take the place of
                the residual (one row per level), a grouping factor with one level, missing labels
                or labels that have no order.
            PrecisionError: float32 arrays that were not asked for.

        Examples:
            >>> X = np.stack([np.ones(180), data["Days"]], axis=1)
            >>> terms = [(data["Subject"], X)]
            >>> design = jaxreml.Design.from_arrays(data["Reaction"], X, terms)
            >>> design.n, design.p, len(design.parameter_names)
            (180, 2, 4)
        """
        terms = listed_terms(terms)
        numbers = [y, X, weights, offset]
        numbers += [part for term in terms for part in (term.effects, term.kernel)]
        traced = any(map(is_traced, [*numbers, *(term.group for term in terms)]))
        kind, work = floating_type(numbers, dtype, traced), widest_type(traced)
        with usual_arithmetic() if traced else nullcontext():
            y, X = read_rows(y, X, work)
            effects = read_terms(terms, len(X), work)
            for own in effects:
                if own.kernel is not None and on_host(own.kernel):
                    known = range(own.n_levels)
                    require_covariance(f"the kernel of {own.name!r}", own.kernel, known)
            basis = Basis.of(
                X,
                effects,
                weights=row_vector(weights, work, len(X), "weights"),
                offset=row_vector(offset, work, len(X), "offset"),
                structure=structure,
            )
            return Design.of(basis, basis.response(y)).of_type(kind)

    @staticmethod
    def from_moments(
        zz: Any,
        zx: Any,
        zy: Any,
        xx: Any,
        xy: Any,
        yy: Any,
        n: Any,
        *,
        log_weights: Any = None,
        names: Sequence[tuple[str, Sequence[str]]] | None = None,
        dtype: Any = None,
    ) -> Design:
        """A design of one grouping factor with J levels from cross-products: sums of products of
        columns over rows, prior weights folded in, as a database has them by GROUP BY.

        Any of them may be traced by JAX, as in `from_arrays`. Sums of squares have half the digits
        of rows: subtract means near to those of the data from y and the columns first. Where less
        than half of the digits are left, `trouble` and `Estimate.status` are ILL_CONDITIONED.

        Args:
            zz: (J, q, q), Z_j'W Z_j of the random effects in each level.
            zx: (J, q, p), Z_j'W X.
            zy: (J, q), Z_j'W y.
            xx: (p, p), X'W X over all rows, positive definite.
            xy: (p,), X'W y.
            yy: (), y'W y, of y less its offset if there is one.
            n: number of rows.
            log_weights: sum of the logarithms of the weights; None without weights. With them
                ``reml_objective(..., harville=True)``, which needs X without them, is NaN.
            names: per random term the grouping factor's name and its effects' names; effects of
                different terms are not correlated. One term of all effects if left out.
            dtype: as in `from_arrays`.

        Raises:
            DataError: shapes that differ, values that are not finite, matrices that are not
                symmetric, X that is not of full rank, a term that can take the place of the
                residual, one level.
            PrecisionError: float32 arrays that were not asked for.

        Examples:
            What a database would sum by subject:

            >>> y = data["Reaction"].to_numpy()
            >>> X = np.stack([np.ones(180), data["Days"]], axis=1)
            >>> Z, z = X.reshape(18, 10, 2), y.reshape(18, 10)
            >>> zz, zy = Z.transpose(0, 2, 1) @ Z, np.einsum("jrq,jr->jq", Z, z)
            >>> design = jaxreml.Design.from_moments(zz, zz, zy, X.T @ X, X.T @ y, y @ y, n=180)
            >>> design.n, design.p
            (180, 2)
        """
        arrays = {"zz": zz, "zx": zx, "zy": zy, "xx": xx, "xy": xy, "yy": yy}
        numbers = [*arrays.values(), n, log_weights]
        traced = any(map(is_traced, numbers))
        kind, work = floating_type(numbers, dtype, traced), widest_type(traced)
        with usual_arithmetic() if traced else nullcontext():
            found = of_moments(arrays, n, log_weights, names, work)
            return Design.of(*found).of_type(kind)

    @staticmethod
    def of(basis: Basis, response: Response) -> Design:
        """The design of one response on a basis."""
        trouble = worse(basis.trouble, response.trouble)
        log_weights = basis.log_weights
        if namespace(trouble) is not np:
            unusable = jnp.isin(trouble, np.array(UNUSABLE))
            log_weights = jnp.where(unusable, jnp.nan, log_weights)
        return Design(
            structure=basis.structure.respond(basis.p, response),
            basis=basis.triangle,
            beta_ols=response.beta_ols,
            residual_ss=response.residual_ss,
            total_ss=response.total_ss,
            log_weights=log_weights,
            log_gram_x=basis.log_gram_x,
            units=basis.units,
            n=basis.n,
            trouble=trouble,
            p=basis.p,
            names=basis.names,
            covariance=basis.covariance,
            dtype=basis.dtype,
        )

    def of_type(self, kind: np.dtype) -> Design:
        """The same in another floating type."""
        if self.dtype == kind.name:
            return self

        def cast(leaf: Any) -> Any:
            floating = hasattr(leaf, "dtype") and np.issubdtype(leaf.dtype, np.floating)
            return leaf.astype(kind) if floating else leaf

        return replace(mapped(cast, self), dtype=kind.name)

    def with_response(self, response: Response) -> Design:
        """The same basis with another response, with lanes if this design has them."""
        return replace(
            self,
            structure=self.structure.respond(self.p, response),
            beta_ols=response.beta_ols,
            residual_ss=response.residual_ss,
            total_ss=response.total_ss,
            trouble=worse(self.trouble, response.trouble),
        )

    def among(self, places: np.ndarray) -> Design:
        """Some of the lanes, on the host."""
        structure: Any = self.structure
        rest: Any = replace(self, structure=None)  # pyright: ignore
        return replace(among(rest, places), structure=structure.among(places))

    def blank(self) -> Design:
        """With a response of length 1 that neither X nor Z explains; in one lane where lanes differ
        by the response only."""
        structure = self.structure
        return self.with_response(
            Response.blank(structure.silent(), self.p, structure.lanes, self.dtype)
        )

    @cached_property
    def collapsed(self) -> Design:
        """For the same criterion, where subjects have a covariance of residuals: those with the
        same visits make few levels, however many they are. On the host."""
        if self.covariance.random.all() or not isinstance(self.structure, Grouped):
            return self
        return replace(self, structure=fewer_levels(self.structure))

    @property
    def first_order(self) -> Design:
        """As if V were linear in omega, for expected informations; itself where it is."""
        structure: Any = self.structure
        own = getattr(structure, "first_order", None)
        return self if own is None else replace(self, structure=own)

    def combined(self, matrix: Array, absent: Array) -> Design:
        """The criterion of the columns [X y] C, for what follows from it alone: see
        `OfColumns.combined`."""
        return replace(self, structure=self.structure.combined(matrix, absent))

    def without_names(self) -> Design:
        """The same design under placeholder names, so that designs that differ only in names share
        one compilation."""
        return replace(self, names=placeholders(self.sizes))


def placeholders(sizes: tuple[int, ...]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """`Design.names` of terms with so many effects each."""
    return tuple((f"g{k}", tuple(f"e{i}" for i in range(q))) for k, q in enumerate(sizes))


def worse(first: Any, second: Any) -> Any:
    """The `Design.trouble` that comes first of two."""
    return first_of({status: (first == status) | (second == status) for status in TROUBLES})


def require_precision(design: Design | Basis) -> None:
    """Refuse, at trace time, to run a float64 design in float32, or where JAX cannot run."""
    require_own_threads()
    if design.dtype == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise PrecisionError(
            "likelihoods need float64 and JAX is set to float32. Run\n"
            f"    {ENABLE_X64}\n"
            "before making arrays, or work inside `with jax.enable_x64(True):`. To use float32 all "
            'the same, make the design with dtype="float32".'
        )


def with_spare_levels(design: Design) -> Design:
    """A grouped design with some levels more, without rows, which change nothing; others, and
    arrays of JAX, as they are.

    Designs of nearly equal numbers of levels become of one shape, and share what is compiled.
    Numbers of levels become multiples of 4 up to 64, and one of eight per doubling above.
    """
    if not isinstance(design.structure, Grouped) or not design.covariance.random.all():
        return design  # subjects with a covariance of residuals may be very many
    if not on_host(*leaves(design.structure)):
        return design
    n_levels = design.structure.factors.shape[-1]
    step = max(4, 1 << max(n_levels.bit_length() - 4, 0))
    return _with_levels(design, -(-n_levels // step) * step)


def _with_levels(design: Design, n_levels: int) -> Design:
    structure: Any = design.structure
    return replace(design, structure=structure.padded(n_levels))


def stack(designs: Iterable[Design]) -> Design:
    """Stack designs for `vmap`: ``jax.vmap(estimate)(stack(designs))``.

    They may differ in everything but shape: responses, X, effects, weights. Grouped designs may
    also differ in their numbers of rows, which none of their arrays has, and of levels: those of
    fewer get levels without rows, which change nothing. Without `stack`, a function of arrays that
    ends in ``estimate(Design.from_arrays(...))`` can itself be mapped with `vmap`, over effects and
    weights too, which of several factors need the "dense" structure.

    Args:
        designs: equal numbers of fixed effects, terms and effects; ungrouped ones of rows too. An
            iterator of them will do. Where their names differ the stack has placeholders.

    Raises:
        DataError: designs that differ in more than the number of levels and in names; none.

    Examples:
        One model for two responses at once, as a batch of designs:

        >>> import jax
        >>> model = "Reaction ~ Days + (Days | Subject)"
        >>> tables = [data, data.assign(Reaction=2 * data["Reaction"])]
        >>> with jax.enable_x64(True):
        ...     designs = jaxreml.stack(jaxreml.design(model, table) for table in tables)
        ...     found = jax.vmap(jaxreml.estimate)(designs)
        >>> np.round(found.beta, 2)
        Array([[251.41,  10.47],
               [502.81,  20.93]], dtype=float64)
    """
    designs = list(designs)
    if not designs:
        raise DataError("there are no designs to stack")
    if not all(isinstance(design, Design) for design in designs):
        wrong = next(design for design in designs if not isinstance(design, Design))
        raise DataError(f"stack takes designs, not {type(wrong).__name__}: see jaxreml.design")
    for what, values in (
        ("numbers of fixed effects", [design.p for design in designs]),
        ("numbers of effects per term", [design.sizes for design in designs]),
        ("covariances", [design.covariance for design in designs]),
        ("structures", [type(design.structure).__name__.lower() for design in designs]),
        ("precisions", [design.dtype for design in designs]),
    ):
        if len(set(values)) > 1:
            other = next(value for value in values if value != values[0])
            raise DataError(
                f"designs with different {what} cannot be stacked: {values[0]} and {other}"
            )
    if len({design.names for design in designs}) > 1:
        designs = [design.without_names() for design in designs]
    if all(isinstance(design.structure, Grouped) for design in designs):
        most = max(design.structure.factors.shape[-1] for design in designs)  # type: ignore[attr-defined]
        designs = [_with_levels(design, most) for design in designs]
    if len({design.units.rotated for design in designs}) > 1:
        covariance = designs[0].covariance
        designs = [replace(design, units=design.units.general(covariance)) for design in designs]
    try:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *designs)
    except ValueError as error:
        raise DataError(f"designs of different shapes cannot be stacked: {error}") from None
