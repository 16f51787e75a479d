"""Plots of many fits; they need ``pip install 'jaxreml[plots]'``.

As in `plots`, every function draws on `ax`, or on a new figure, and returns the Axes; what it draws
is the frame that the function of the same name with ``_data`` gives. Points are drawn as pixels in
vector files, so that 20,000 of them are no burden.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from jaxreml.errors import DataError
from jaxreml.inference.batches import discoveries
from jaxreml.results.batch_summaries import top_table
from jaxreml.results.plots.canvas import (
    BLUE,
    FAINT,
    PALETTE,
    VERMILLION,
    label_below,
    legend_above,
    new_axes,
    point_size,
)

if TYPE_CHECKING:
    from jaxreml.results.batch import BatchResults
    from jaxreml.results.moderated import ModeratedResults

    Batch = BatchResults | ModeratedResults

QUIET = {"color": "0.6", "alpha": 0.3}
BINS = 40
FEWEST = 1e-300  # p-values below this are drawn there
FONT, HEIGHT, WIDTH = 8, 10.0, 5.8  # of labels: size, height and width of a letter, in points
QUANTILES = 1001  # of a distribution whose density is drawn
BAND = 0.95  # of the p-values of true null hypotheses


def volcano_data(results: Batch, coef: str, *, level: float = 0.05) -> pd.DataFrame:
    """Estimates of a coefficient or contrast and how sure they are.

    Args:
        results: the fits, moderated or not.
        coef: name of the coefficient or contrast.
        level: the false discovery rate of what counts as a discovery.

    Returns:
        A row per response with a test, which the index names: estimate, neg_log10_p, p_adjusted and
        discovery.

    Raises:
        DataError: no such coefficient or contrast.

    Examples:
        >>> table = jaxreml.batch_plots.volcano_data(moderated, "Days")
        >>> table["discovery"].sum().item()
        5
    """
    table = top_table(results, coef, None, "none")
    return pd.DataFrame(
        {
            "estimate": table["estimate"],
            "neg_log10_p": _logs(table["p_value"]),
            "p_adjusted": table["p_adjusted"],
            "discovery": table["p_adjusted"] <= level,
        }
    )


def volcano(
    results: Batch, coef: str, *, level: float = 0.05, labels: int = 10, ax: Any = None
) -> Any:
    """-log10 p against the estimate: discoveries vermillion if they are up and blue if down, the
    `labels` surest of them named; other arguments as for `volcano_data`.

    Examples:
        >>> axes = jaxreml.batch_plots.volcano(moderated, "Days", labels=5)
        >>> axes.figure.savefig("volcano.png", dpi=300)
    """
    frame = volcano_data(results, coef, level=level)
    ax = new_axes(ax)
    _discoveries(ax, frame, "estimate", "neg_log10_p")
    ax.axvline(0, **FAINT)
    found = frame[frame["discovery"]]
    if len(found):  # the edge of the discoveries
        ax.axhline(found["neg_log10_p"].min(), **FAINT)
    ax.set(xlabel=f"estimate of {coef}", ylabel=r"$-\log_{10}\,p$")
    ax.set_ylim(bottom=0)
    ax.margins(x=0.08)
    _name(ax, found, "estimate", "neg_log10_p", np.asarray(found["neg_log10_p"]), labels)
    return ax


def mean_difference_data(
    results: Batch, coef: str, mean: Any = None, *, level: float = 0.05
) -> pd.DataFrame:
    """Estimates of a coefficient or contrast and means of the responses.

    Args:
        results: the fits, moderated or not.
        coef: name of the coefficient or contrast.
        mean: a number for each response to have instead of its mean over the rows used.
        level: the false discovery rate of what counts as a discovery.

    Returns:
        A row per response with a test: mean, estimate, p_adjusted and discovery.

    Raises:
        DataError: no such coefficient or contrast.
        ValueError: `mean` has another length.

    Examples:
        >>> table = jaxreml.batch_plots.mean_difference_data(results, "Days")
        >>> table[["mean", "estimate"]].round(2).head(2)
               mean  estimate
        gene1  1.29      0.18
        gene2  0.79      0.20
    """
    table = top_table(results, coef, None, "none")
    if mean is not None:
        if np.shape(mean) != (len(results),):
            raise ValueError(f"mean must have a number for each of {len(results)} responses")
        own = pd.Series(np.asarray(mean, float), results.responses)
        table["mean"] = own[table.index]
    columns = {name: table[name] for name in ("mean", "estimate", "p_adjusted")}
    return pd.DataFrame(columns | {"discovery": table["p_adjusted"] <= level})


def mean_difference(
    results: Batch,
    coef: str,
    mean: Any = None,
    *,
    level: float = 0.05,
    labels: int = 10,
    ax: Any = None,
) -> Any:
    """An MA plot, the estimate against the mean of the response, with discoveries as in `volcano`,
    the `labels` largest of them named; other arguments as for `mean_difference_data`.

    Examples:
        >>> axes = jaxreml.batch_plots.mean_difference(results, "Days")
    """
    frame = mean_difference_data(results, coef, mean, level=level)
    ax = new_axes(ax)
    _discoveries(ax, frame, "mean", "estimate")
    ax.axhline(0, **FAINT)
    ax.set(xlabel="mean of the response", ylabel=f"estimate of {coef}")
    ax.margins(y=0.08)
    found = frame[frame["discovery"]]
    _name(ax, found, "mean", "estimate", np.abs(np.asarray(found["estimate"])), labels)
    return ax


def p_histogram_data(results: Batch, coef: str, *, bins: int = BINS) -> pd.DataFrame:
    """How many p-values of a coefficient or contrast are where: columns left, right and count, a
    row per bin.

    Examples:
        >>> jaxreml.batch_plots.p_histogram_data(results, "Days", bins=4)
           left  right  count
        0  0.00   0.25     14
        1  0.25   0.50     10
        2  0.50   0.75      6
        3  0.75   1.00     10
    """
    p = top_table(results, coef, None, "none")["p_value"]
    counts, edges = np.histogram(p, bins, (0.0, 1.0))
    return pd.DataFrame({"left": edges[:-1], "right": edges[1:], "count": counts})


def p_histogram(results: Batch, coef: str, *, bins: int = BINS, ax: Any = None) -> Any:
    """Histogram of p-values, with the height that true null hypotheses have by Storey's estimate of
    their share; arguments as for `p_histogram_data`.

    Examples:
        >>> axes = jaxreml.batch_plots.p_histogram(results, "Days", bins=10)
    """
    frame = p_histogram_data(results, coef, bins=bins)
    ax = new_axes(ax)
    width = frame["right"] - frame["left"]
    ax.bar(frame["left"], frame["count"], width, align="edge", color=BLUE, edgecolor="white",
           linewidth=0.5)  # fmt: skip
    p = top_table(results, coef, None, "none")["p_value"].to_numpy()
    try:
        share = discoveries.null_share(p)
    except DataError:  # no p-value is large
        share = 0.0
    ax.axhline(share * len(p) / len(frame), color="black", linewidth=1, linestyle="--",
               label=f"true null hypotheses: {share:.0%}")  # fmt: skip
    ax.set(xlabel=f"p-value of {coef}", ylabel="responses", xlim=(0, 1))
    ax.legend(frameon=False)
    return ax


def qq_p_data(results: Batch, coef: str) -> pd.DataFrame:
    """p-values of a coefficient or contrast in order, and those of true null hypotheses.

    Returns:
        A row per response with a test, the least p-value first: expected, observed, lower and
        upper, all -log10; the last two are the band that 95 % of each are in, if all hypotheses are
        true and tests independent.

    Examples:
        >>> jaxreml.batch_plots.qq_p_data(results, "Days").round(1).tail(2)
                expected  observed  lower  upper
        gene33       0.0       0.0    0.0    0.1
        gene6        0.0       0.0    0.0    0.0
    """
    from scipy.special import betaincinv

    p = top_table(results, coef, None)["p_value"]  # in order
    m = len(p)
    rank = np.arange(1, m + 1)
    # The smallest of m independent uniform numbers have beta distributions.
    tails = (1 + BAND) / 2, (1 - BAND) / 2
    lower, upper = (-np.log10(betaincinv(rank, m + 1 - rank, tail)) for tail in tails)
    columns = {"expected": -np.log10((rank - 0.5) / m), "observed": _logs(p)}
    return pd.DataFrame(columns | {"lower": lower, "upper": upper}, p.index)


def qq_p(results: Batch, coef: str, *, ax: Any = None) -> Any:
    """Quantile plot of p-values, with the band in which those of true null hypotheses are and the
    genomic inflation lambda (Devlin and Roeder 1999).

    Examples:
        >>> axes = jaxreml.batch_plots.qq_p(results, "Days")
    """
    frame = qq_p_data(results, coef)
    ax = new_axes(ax)
    inflation = discoveries.inflation(10.0 ** -frame["observed"].to_numpy())
    ax.fill_between(frame["expected"], frame["lower"], frame["upper"], color="0.88", linewidth=0)
    ax.axline((0, 0), slope=1, color="0.5", linewidth=0.8)
    ax.scatter(frame["expected"], frame["observed"], s=9, linewidths=0, rasterized=True)
    ax.set(xlabel=r"expected $-\log_{10}\,p$", ylabel=rf"observed $-\log_{{10}}\,p$ of {coef}")
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    ax.text(0.04, 0.95, rf"$\lambda$ = {inflation:.3f}", transform=ax.transAxes, va="top")
    return ax


def variance_fractions_data(results: BatchResults) -> pd.DataFrame:
    """`BatchResults.variance_fractions` of responses with an optimum: the parts by their medians,
    the largest first, and Residual last.

    Examples:
        >>> parts = jaxreml.batch_plots.variance_fractions_data(results)
        >>> parts.median().round(1).to_dict()
        {'Subject': 0.5, 'Days': 0.0, 'Residual': 0.5}
    """
    frame = results.variance_fractions(output="pandas").dropna()
    middle = np.median(frame.to_numpy()[:, :-1], axis=0) if len(frame) else np.zeros(0)
    return frame.iloc[:, [*np.argsort(-middle, kind="stable"), -1]]


def variance_fractions(results: BatchResults, *, ax: Any = None) -> Any:
    """A violin for each part of the variance, over the responses, with a box from quartile to
    quartile and the median.

    Examples:
        >>> axes = jaxreml.batch_plots.variance_fractions(results)
    """
    frame = variance_fractions_data(results)
    if not len(frame):
        raise DataError("no response has an optimum: there is nothing to draw")
    ax = new_axes(ax)
    values = frame.to_numpy()
    places = np.arange(frame.shape[1])
    varies = np.ptp(values, axis=0) > 0
    if varies.any():
        few = np.quantile(values[:, varies], np.linspace(0, 1, QUANTILES), axis=0)
        drawn = ax.violinplot(few, places[varies], widths=0.85, showextrema=False, points=200)
        for place, body in zip(places[varies], drawn["bodies"], strict=True):
            last = place == places[-1]
            body.set(
                facecolor="0.75" if last else PALETTE[place % len(PALETTE)], alpha=0.7, linewidth=0
            )
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
    ax.vlines(places, low, high, color="black", linewidth=5, alpha=0.7)
    ax.scatter(places, middle, s=22, color="white", edgecolor="black", linewidth=0.8, zorder=3)
    label_below(ax, list(frame.columns))
    ax.set(ylabel="fraction of the variance", ylim=(0, 1))
    return ax


def moderation_data(results: ModeratedResults, mean: Any = None) -> pd.DataFrame:
    """Residual standard deviations before and after moderation.

    Args:
        results: moderated.
        mean: a number for each response to have instead of the trend's covariate, or of its mean
            where there is no trend.

    Returns:
        A row per response with an optimum, by the covariate: covariate, residual_sd, prior_sd and
        posterior_sd.

    Raises:
        ValueError: `mean` has another length.

    Examples:
        >>> table = jaxreml.batch_plots.moderation_data(moderated)
        >>> table[["residual_sd", "prior_sd", "posterior_sd"]].round(2).head(2)
                residual_sd  prior_sd  posterior_sd
        gene40         0.85      1.02          0.86
        gene17         0.82      1.02          0.83
    """
    own = results.mean if results.trend is None else results.trend
    covariate = own if mean is None else np.asarray(mean, float)
    if np.shape(covariate) != (len(results),):
        raise ValueError(f"mean must have a number for each of {len(results)} responses")
    columns = {
        "covariate": np.asarray(covariate),
        "residual_sd": results.fits.sigma,
        "prior_sd": np.sqrt(results.prior_variance.to_numpy()),
        "posterior_sd": np.sqrt(results.posterior_variance.to_numpy()),
    }
    frame = pd.DataFrame(columns, results.responses)
    return frame.dropna().sort_values("covariate", kind="stable")


def moderation(results: ModeratedResults, mean: Any = None, *, ax: Any = None) -> Any:
    """Residual standard deviations against the mean or the trend's covariate: as fitted, moderated,
    and the prior towards which they are drawn; arguments as for `moderation_data`.

    Examples:
        >>> axes = jaxreml.batch_plots.moderation(results.moderated(trend=True))
    """
    frame = moderation_data(results, mean)
    ax = new_axes(ax)
    size = point_size(len(frame))
    drawn = (("residual_sd", "as fitted", "0.45", 0.4), ("posterior_sd", "moderated", BLUE, 0.25))
    for column, label, color, alpha in drawn:
        ax.scatter(frame["covariate"], frame[column], s=size, color=color, alpha=alpha,
                   linewidths=0, rasterized=True, label=label)  # fmt: skip
    ax.plot(frame["covariate"], frame["prior_sd"], color=VERMILLION, linewidth=2, label="prior")
    _log_scale(ax)
    usual = mean is None and frame["covariate"].equals(results.mean[frame.index])
    what = "mean of the response" if usual else "covariate"
    ax.set(xlabel=what, ylabel="residual standard deviation")
    legend_above(ax)
    return ax


def mean_variance(voom: Any, *, ax: Any = None) -> Any:
    """The trend that `jaxreml.voom` makes weights of: square roots of residual standard deviations
    against mean log counts, a point per gene; its frame is ``voom.trend``.

    Examples:
        >>> found = jaxreml.voom(counts, "~ Days + (1 | Subject)", data)
        >>> axes = jaxreml.batch_plots.mean_variance(found)
    """
    ax = new_axes(ax)
    frame = voom.trend.sort_values("mean_log_count")
    ax.scatter(frame["mean_log_count"], frame["sqrt_sd"], s=point_size(len(frame)), linewidths=0,
               rasterized=True, **QUIET)  # fmt: skip
    ax.plot(frame["mean_log_count"], frame["fitted"], color=VERMILLION, linewidth=2, label="trend")
    ax.set(xlabel="mean log2 count", ylabel="square root of the residual SD")
    legend_above(ax)
    return ax


def _log_scale(ax: Any) -> None:
    """A logarithmic vertical axis with numbers at 1, 2, 5, 10, ..."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _logs(p_values: Any) -> np.ndarray:
    return -np.log10(np.maximum(np.asarray(p_values, float), FEWEST))


def _discoveries(ax: Any, frame: pd.DataFrame, x: str, y: str) -> None:
    """Points, discoveries over the others, with how many there are."""
    size, found, up = point_size(len(frame)), frame["discovery"], frame["estimate"] > 0
    ax.scatter(frame[x][~found], frame[y][~found], s=size, linewidths=0, rasterized=True, **QUIET)
    for chosen, color, word in ((found & up, VERMILLION, "up"), (found & ~up, BLUE, "down")):
        ax.scatter(frame[x][chosen], frame[y][chosen], s=1.6 * size, color=color, alpha=0.7,
                   linewidths=0, rasterized=True, label=f"{np.sum(chosen)} {word}")  # fmt: skip
    legend_above(ax)


def _name(ax: Any, frame: Any, x: str, y: str, size: np.ndarray, count: int) -> None:
    """Write names beside the `count` largest points, over no other name or point of the frame, with
    lines where they had to move."""
    if not len(frame):
        return
    ax.figure.draw_without_rendering()  # the layout and the limits are settled then
    unit = ax.figure.dpi / 72
    (left, bottom), (right, top) = ax.get_window_extent().get_points() / unit
    places = frame[[x, y]].to_numpy(float)
    points = ax.transData.transform(places) / unit
    taken = [*np.concatenate([points - 1.5, points + 1.5], axis=1)]
    line = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
    for k in np.argsort(-size, kind="stable")[:count]:
        (px, py), name = points[k], str(frame.index[k])
        width = WIDTH * len(name)
        for dx, dy in _places(width, right=bool(px > (left + right) / 2)):
            box = np.array([px + dx, py + dy - HEIGHT / 2, px + dx + width, py + dy + HEIGHT / 2])
            inside = left < box[0] and box[2] < right and bottom < box[1] and box[3] < top
            if inside and not _meets(box, np.array(taken)):
                break
        else:
            continue
        taken.append(box)
        near, side = (dx, "left") if dx > 0 else (dx + width, "right")
        if dy:
            ax.annotate("", places[k], (near, dy), "data", "offset points", arrowprops=line)
        ax.annotate(
            name, places[k], (near, dy), "data", "offset points", fontsize=FONT, ha=side,
            va="center_baseline",
        )  # fmt: skip


def _places(width: float, *, right: bool) -> Iterable[tuple[float, float]]:
    """Where a label may begin, in points from its own point: near before far, outwards first."""
    for step in (0, 1, -1, 2, -2, 3, -3, 4, -4, 6, -6, 8, -8):
        gap = 4 + 3 * abs(step)
        for dx in (gap, -gap - width) if right else (-gap - width, gap):
            yield dx, step * HEIGHT


def _meets(box: np.ndarray, others: np.ndarray) -> bool:
    """Whether a rectangle (left, bottom, right, top) overlaps one of (k, 4)."""
    apart = (box[:2] >= others[:, 2:]).any(axis=1) | (others[:, :2] >= box[2:]).any(axis=1)
    return not apart.all()
