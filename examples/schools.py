"""REML from the ground up, on twelve students in three schools.

The model: student i of school j scores y_ij = mu + b_j + e_ij, with b_j ~ N(0, tau2) between
schools and e_ij ~ N(0, sigma2) within. How large are tau2 and sigma2? Five routes to one answer:
by hand, by a NumPy function, by an optimiser on jaxreml's objective, and by `jaxreml.fit`.

Run: python examples/schools.py [FIGURE.png]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxreml

SEED = 24  # one where tau2 is positive by both formulas; see `negative` in step_b
K, N = 3, 4  # schools, students per school
MU, TAU2, SIGMA2 = 70.0, 36.0, 25.0  # the truth that the estimates try to recover

CLOSED_FORM = 1e-8  # relative: `fit` against the closed forms
BY_HAND = 1e-6  # absolute, log-variances: NumPy with finite differences against `fit`
BY_OPTAX = 1e-6  # absolute, log-variances: L-BFGS against `fit`
SE = 1e-6  # relative: standard errors, exact against finite-difference Hessian
BLUE, VERMILLION = "#0072B2", "#D55E00"  # Okabe and Ito's


def main(path: str | Path | None = None) -> dict:
    scores = simulate(np.random.default_rng(SEED), 1)[0]
    anova = step_a(scores)
    reml, ml, average = step_b(anova)

    y, school = scores.ravel(), np.repeat(["A", "B", "C"], N)
    objective = neg2_restricted_loglik(y, school)
    by_hand, se_by_hand = step_c(objective, y)

    data = {"score": y, "school": school}
    by_optax, steps = step_d(data)
    fit, fit_ml = step_e(data, by_hand, se_by_hand)

    log_variances = fit.log_variances.to_numpy()
    np.testing.assert_allclose(np.exp(log_variances), reml, rtol=CLOSED_FORM)
    np.testing.assert_allclose(np.exp(fit_ml.log_variances), ml, rtol=CLOSED_FORM)
    np.testing.assert_allclose(by_hand, log_variances, rtol=0, atol=BY_HAND)
    np.testing.assert_allclose(by_optax, log_variances, rtol=0, atol=BY_OPTAX)
    np.testing.assert_allclose(se_by_hand, fit.log_variance_se, rtol=SE)
    np.testing.assert_allclose(objective(log_variances), fit.criterion, rtol=1e-12)
    print("\nAll five routes agree.")
    return {
        "anova": anova,
        "reml": reml,
        "ml": ml,
        "average": average,
        "plot": None if path is None else draw(average, reml[0], Path(path)),
        "log_variances_numpy": by_hand,
        "log_variances_optax": by_optax,
        "log_variances_fit": log_variances,
        "se_numpy": se_by_hand,
        "se_fit": fit.log_variance_se.to_numpy(),
        "criterion_numpy": objective(log_variances),
        "criterion_fit": fit.criterion,
        "converged": fit.converged and fit_ml.converged,
        "optax_steps": steps,
    }


def simulate(rng: np.random.Generator, copies: int) -> np.ndarray:
    """Scores (copies, K, N) from the model."""
    between = np.sqrt(TAU2) * rng.standard_normal((copies, K, 1))
    return MU + between + np.sqrt(SIGMA2) * rng.standard_normal((copies, K, N))


def step_a(scores: np.ndarray) -> dict:
    print(f"(a) {K} schools, {N} students each; true tau2 = {TAU2:g}, sigma2 = {SIGMA2:g}\n")
    for name, row in zip("ABC", scores, strict=True):
        print(f"    school {name}:{''.join(f'{x:7.1f}' for x in row)}   mean {row.mean():6.2f}")
    means = scores.mean(axis=1)
    anova = {
        "var_means": means.var(ddof=1),
        "msb": N * means.var(ddof=1),
        "msw": scores.var(axis=1, ddof=1).mean(),
    }
    print(f"""
    variance of the school means      {anova["var_means"]:8.3f}
    mean square between, MSB = n * it {anova["msb"]:8.3f}
    mean square within, MSW           {anova["msw"]:8.3f}

    The school means vary for two reasons: schools differ (tau2), and each mean is of only
    {N} students (sigma2 / {N}). So their variance is too large an estimate of tau2.""")
    return anova


def closed_form(
    msb: np.ndarray | float, msw: np.ndarray | float, *, reml: bool
) -> np.ndarray | float:
    """tau2 in the balanced one-way layout, where it is positive; sigma2 is MSW either way."""
    ssb = (K - 1) * msb
    return (ssb / (K - 1 if reml else K) - msw) / N


def step_b(anova: dict) -> tuple[np.ndarray, np.ndarray, dict]:
    msb, msw = anova["msb"], anova["msw"]
    reml = np.array([closed_form(msb, msw, reml=True), msw])
    ml = np.array([closed_form(msb, msw, reml=False), msw])

    # The formulas are linear in the mean squares, so without truncation at zero their bias is
    # exact arithmetic: E MSB = n tau2 + sigma2 and E MSW = sigma2. A simulation shows the same.
    many = simulate(np.random.default_rng(SEED + 1), 100_000)
    msbs = N * many.mean(axis=2).var(axis=1, ddof=1)
    msws = many.var(axis=2, ddof=1).mean(axis=1)
    expected_msb = N * TAU2 + SIGMA2
    draws = {name: closed_form(msbs, msws, reml=name == "reml") for name in ("reml", "ml")}
    average = {
        "draws": draws,
        "reml": draws["reml"].mean(),
        "ml": draws["ml"].mean(),
        "negative": (draws["reml"] < 0).mean(),
        "reml_expected": closed_form(expected_msb, SIGMA2, reml=True),
        "ml_expected": closed_form(expected_msb, SIGMA2, reml=False),
    }
    print(f"""
(b) By hand

                                        tau2    sigma2
    REML  (MSB - MSW) / n           {reml[0]:8.3f}  {reml[1]:8.3f}
    ML    (SSB / k - MSW) / n       {ml[0]:8.3f}  {ml[1]:8.3f}

    They differ in one divisor: SSB / (k - 1) against SSB / k. ML measures the spread of the
    school means around their own average as if that were mu. But the average was fitted to
    these very means and lies closer to them than mu does: one of {K} degrees of freedom is
    spent, and ML does not count it. REML does: it is the likelihood of contrasts of y that do
    not involve mu at all. (sigma2 is the same here: within schools, the school means absorb
    the fitting of mu.) Average of tau2 over 100,000 simulated sets, true {TAU2:g}:

    REML  {average["reml"]:6.2f}   (expected {average["reml_expected"]:.2f}: unbiased)
    ML    {average["ml"]:6.2f}   (expected {average["ml_expected"]:.2f}: biased down)

    In {average["negative"]:.0%} of the sets the REML formula is negative. A variance is not: the
    likelihood is then highest at tau2 = 0; jaxreml calls it singular, log-variance -inf.""")
    return reml, ml, average


def neg2_restricted_loglik(y: np.ndarray, school: np.ndarray) -> Callable[[np.ndarray], float]:
    """-2 log restricted likelihood of (log tau2, log sigma2), written out as in the textbook."""
    X = np.ones((y.size, 1))
    same_school = (school[:, None] == school).astype(float)  # Z Z'
    constant = (y.size - X.shape[1]) * np.log(2 * np.pi)

    def value(log_variances: np.ndarray) -> float:
        tau2, sigma2 = np.exp(log_variances)
        V = tau2 * same_school + sigma2 * np.eye(y.size)
        V_inverse = np.linalg.inv(V)  # n = 12: clarity before speed
        information = X.T @ V_inverse @ X
        beta = np.linalg.solve(information, X.T @ V_inverse @ y)
        residual = y - X @ beta
        logdets = np.linalg.slogdet(V)[1] + np.linalg.slogdet(information)[1]
        return float(constant + logdets + residual @ V_inverse @ residual)

    return value


def slope(f: Callable, x: np.ndarray, h: float = 5e-3) -> np.ndarray:
    """Derivatives of f along each coordinate of x, by fourth-order central differences."""
    rows = []
    for step in h * np.eye(x.size):
        near, far = f(x + step) - f(x - step), f(x + 2 * step) - f(x - 2 * step)
        rows.append((8 * near - far) / (12 * h))
    return np.array(rows)


def step_c(objective: Callable, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    def gradient(x: np.ndarray) -> np.ndarray:
        return slope(objective, x)

    print("""
(c) REML from scratch: V = tau2 ZZ' + sigma2 I in full, and Newton's method on

    (n - p) log 2 pi + log|V| + log|X'V^-1 X| + (y - Xb)' V^-1 (y - Xb)

    with derivatives by finite differences, in log-variances, which need no bounds.

    step   log tau2  log sigma2     criterion   |gradient|""")
    x = np.full(2, np.log(y.var() / 2))  # half of the variance to each
    for count in range(20):
        g = gradient(x)
        print(
            f"    {count:4d}{x[0]:11.6f}{x[1]:12.6f}{objective(x):14.8f}{np.linalg.norm(g):13.1e}"
        )
        if np.linalg.norm(g) < 1e-9:
            break
        step = np.linalg.solve(slope(gradient, x), -g)
        while objective(x + step) > objective(x) + 1e-12:  # halve a step that overshoots
            step = step / 2
        x = x + step
    else:
        raise RuntimeError("Newton's method has not converged")
    covariance = 2 * np.linalg.inv(slope(gradient, x))  # the criterion is -2 log L, hence the 2
    return x, np.sqrt(np.diagonal(covariance))


def step_d(data: dict) -> tuple[np.ndarray, int]:
    with jax.enable_x64(True):  # likelihoods need float64, and JAX starts in float32
        design = jaxreml.design("score ~ 1 + (1 | school)", data)
        solver = optax.lbfgs()

        def objective(params):
            return jaxreml.reml_objective(params, design)

        value_and_grad = optax.value_and_grad_from_state(objective)

        @jax.jit
        def step(params, state):
            value, grad = value_and_grad(params, state=state)
            updates, state = solver.update(
                grad, state, params, value=value, grad=grad, value_fn=objective
            )
            params = optax.apply_updates(params, updates)
            # the line search leaves the gradient at the new point in the state
            return params, state, jnp.linalg.norm(optax.tree_utils.tree_get(state, "grad"))

        params = jnp.full(2, np.log(np.var(data["score"]) / 2))
        state, norm, steps = solver.init(params), np.inf, 0
        while not norm <= 1e-8:  # NaN goes on to the limit below
            if steps == 100:
                raise RuntimeError(f"L-BFGS has not converged: gradient norm {norm:.1e}")
            params, state, norm = step(params, state)
            steps += 1
        params = np.asarray(params)
    print(f"""
(d) jaxreml.reml_objective, minimised by optax.lbfgs from the objective alone

    log tau2 {params[0]:.6f}, log sigma2 {params[1]:.6f}
    after {steps} steps, gradient norm {norm:.1e}""")
    return params, steps


def step_e(
    data: dict, by_hand: np.ndarray, se_by_hand: np.ndarray
) -> tuple[jaxreml.LMMResults, jaxreml.LMMResults]:
    fit = jaxreml.fit("score ~ 1 + (1 | school)", data)
    fit_ml = jaxreml.fit("score ~ 1 + (1 | school)", data, method="ML")
    print("""
(e) jaxreml.fit("score ~ 1 + (1 | school)", data)

                     variance  log-variance      SE     by hand, (c):       SE""")
    for k, row in enumerate(fit.variance_components.itertuples()):
        print(
            f"    {row.group:12s}{row.variance:13.3f}{row.log_variance:14.6f}"
            f"{row.log_variance_se:10.5f}{by_hand[k]:15.6f}{se_by_hand[k]:11.5f}"
        )
    se = fit.log_variance_se.iloc[0]
    factor = np.exp(1.96 * se)
    print(f"""
    mu {fit.params.iloc[0]:.3f}, SE {fit.bse.iloc[0]:.3f}; criterion {fit.criterion:.6f}

    An SE of {se:.2f} on the log scale is a factor of {factor:.0f} either way in tau2 (95%):
    three schools say little about how schools vary.""")
    return fit, fit_ml


def draw(average: dict, here: float, path: Path) -> Path | None:
    """How estimates by both formulas scatter; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nNo plot: it needs matplotlib, pip install 'jaxreml[plots]'")
        return None
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    ax = figure.subplots()
    bins = np.linspace(-12, 150, 82)
    for name, colour in (("reml", BLUE), ("ml", VERMILLION)):
        ax.hist(average["draws"][name], bins, histtype="step", color=colour, lw=1.8, density=True)
        label = f"{name.upper()}: {average[name]:.1f} on average"
        ax.axvline(average[name], color=colour, lw=1.8, ls="--", label=label)
    ax.axvline(TAU2, color="0.2", lw=1.2, label=f"true: {TAU2:g}")
    ax.plot(here, 0, "v", color=BLUE, ms=9, clip_on=False, label=f"REML here: {here:.1f}", ls="")
    ax.set(xlim=(-12, 150), yticks=[], xlabel="estimated variance between schools")
    ax.set_title(f"100,000 simulated sets of {K} schools with {N} students each", fontsize=10)
    ax.legend(frameon=False)
    ax.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=100)
    return path


if __name__ == "__main__":
    main(*sys.argv[1:2])
