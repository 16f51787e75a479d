"""Whether one model is a special case of another, from the arrays of their model frames.

The mean of a model is an offset plus the columns of X; each random term adds Z_j Sigma Z_j' for
every level j of its grouping factor. So a model is nested in another if its columns and the
difference of the offsets lie in the other's column space, and each of its random terms can be
written as a constraint on one of the other's: its effects lie in the span of the other's effects
on the same grouping factor. A term on a finer factor is such a constraint too where the other's
effects tell its levels apart: (1 | a) + (1 | a:b) is (0 + b | a) with compound symmetry. Several
terms may share such a term, each for some of its levels: (1 | a) is a case of (0 + u + v || a)
where u marks some levels of a and v the others.

Labels play no part: grouping factors are compared as partitions of the rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import qr
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from jaxreml.data.frame import GroupingTerm, ModelFrame
from jaxreml.data.grouping import same_partition
from jaxreml.model.covariance.words import SYNONYMS

OUTSIDE = 1e-7  # share of a column outside a span, beyond which it counts


class Step(NamedTuple):
    """What the random terms of a larger model have beyond those of one nested in it.

    Attributes:
        on_boundary: whether covariance matrices of the larger are singular in the smaller, so that
            a variance is tested on the boundary of its space.
        one_effect: whether the larger has one random effect more, by itself or correlated with
            those of one term, and the same random terms otherwise.
    """

    on_boundary: bool
    one_effect: bool


def outside(columns: np.ndarray, span: np.ndarray) -> np.ndarray:
    """Which columns, (k,) booleans, do not lie in the column space of `span`."""
    columns = _unit(columns)
    if not span.shape[1]:
        return np.any(columns != 0, axis=0)
    factors: Any = qr(_unit(span), mode="economic", pivoting=True)
    basis = factors[0][:, np.abs(np.diagonal(factors[1])) > OUTSIDE]
    rest = columns - basis @ (basis.T @ columns)
    return np.linalg.norm(rest, axis=0) > OUTSIDE


def _unit(columns: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(columns, axis=0)
    return columns / np.where(lengths > 0, lengths, 1.0)


def same_mean(first: ModelFrame, second: ModelFrame) -> bool:
    """Whether two models have the same means to choose from."""
    return not mean_obstacle(first, second) and not mean_obstacle(second, first)


def mean_obstacle(small: ModelFrame, large: ModelFrame) -> str:
    """Why the mean of `small` is not a special case of that of `large`, or ""."""
    alien = outside(small.X, large.X)
    if alien.any():
        names = [name for name, out in zip(small.fixed_names, alien, strict=True) if out]
        return f"its fixed effects {', '.join(names)} are not among the larger model's"
    difference = _offset(small) - _offset(large)
    if np.any(difference) and outside(difference[:, None], large.X).any():
        return "its offset is not that of the larger model"
    return ""


def _offset(frame: ModelFrame) -> np.ndarray:
    return np.zeros(len(frame.X)) if frame.offset is None else frame.offset


def random_obstacle(small: ModelFrame, large: ModelFrame) -> str:
    """Why the random terms of `small` are not special cases of those of `large`, or ""."""
    for term in small.terms:
        if not _images(term, large):
            effects = " + ".join(term.effect_names)
            text = f"{term.covariance.prefix}({effects} | {term.name})"
            return f"its random term {text} is a case of none of the larger's"
    return ""


# Families of residual covariances, and of random effects by their names among these, that a family
# is a special case of, on the same visits or effects; one of a user's own is of "us"
_WIDER = {
    "homdiag": {"diag", "cs", "csh", "ar1", "ar1h", "toep", "toeph", "us"},
    "diag": {"us", "csh", "ar1h", "adh", "toeph"},
    "cs": {"csh", "toep", "toeph", "us"},
    "csh": {"toeph", "us"},
    "ar1": {"ar1h", "ad", "adh", "toep", "toeph", "us"},
    "ar1h": {"adh", "toeph", "us"},
    "ad": {"adh", "us"},
    "adh": {"us"},
    "toep": {"toeph", "us"},
    "toeph": {"us"},
    "sp_exp": {"us"},
    "sp_gau": {"us"},
}


def residual_obstacle(small: ModelFrame, large: ModelFrame) -> str:
    """Why the residuals' covariance of `small` is not a special case of that of `large`, or ""."""
    first, second = small.residual, large.residual
    if first is None:
        return ""
    if second is None:
        return f"the larger has independent residuals, and it has {first.words.text}"
    visits, others = (own.places % len(own.visits) for own in (first, second))
    subjects = first.words.family == "diag" or same_partition(first.codes, second.codes)
    if not (subjects and np.array_equal(visits, others)):
        return f"{first.words.text} and {second.words.text} have other visits or subjects"
    if first.words.arm is not None and not np.array_equal(first.places, second.places):
        return f"{first.words.text} has a covariance for each {first.words.arm}"
    family, wider = (SYNONYMS.get(own.words.family, own.words.family) for own in (first, second))
    same = family == wider and first.words.own is second.words.own
    if not same and wider not in _WIDER.get(family, {"us"}):
        return f"{family} is no case of {wider}"
    return ""


def step(small: ModelFrame, large: ModelFrame) -> Step:
    """How the random terms of a nested model differ from those of the larger one."""
    images = [_images(term, large) for term in small.terms]
    on_boundary = False
    for k, other in enumerate(large.terms):
        own = [image[k] for image in images if k in image]
        columns = np.concatenate([np.zeros((len(small.X), 0)), *own], axis=1)
        on_boundary |= bool(outside(other.effects, columns).any())

    left = list(large.terms)
    grown = []
    for term in small.terms:
        same = [k for k, other in enumerate(left) if _same_term(term, other)]
        if same:
            del left[same[0]]
        else:
            grown.append(term)
    one_effect = False
    if len(left) == 1 and left[0].covariance.word == "us":
        (other,) = left
        everywhere = np.ones(len(small.X), bool)
        images = [_image(term, other, everywhere) for term in grown]
        sizes = [len(term.effect_names) for term in grown]
        one_effect = (
            len(grown) <= 1
            and sum(sizes) + 1 == len(other.effect_names)
            and all(image is not None and image.shape[1] == sizes[0] for image in images)
        )
    return Step(on_boundary, one_effect)


def _same_term(first: GroupingTerm, second: GroupingTerm) -> bool:
    return (
        len(first.effect_names) == len(second.effect_names)
        and _same_kernel(first, second)
        and same_partition(first.codes, second.codes)
        and not outside(first.effects, second.effects).any()
    )


def _same_kernel(first: GroupingTerm, second: GroupingTerm) -> bool:
    """Whether levels are independent in both terms, or related in the same way."""
    if first.kernel is None or second.kernel is None:
        return first.kernel is second.kernel
    if not same_partition(first.codes, second.codes):
        return False
    places = np.unique(first.codes, return_index=True)[1]
    own, other = (term.kernel[np.ix_(term.codes[places], term.codes[places])]  # pyright: ignore
                  for term in (first, second))  # fmt: skip
    return np.array_equal(own, other)


def _cross(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Codes of the combinations of two factors."""
    pairs = first.astype(np.int64) * (int(second.max()) + 1) + second
    return np.unique(pairs, return_inverse=True)[1]


def _images(term: GroupingTerm, large: ModelFrame) -> dict[int, np.ndarray]:
    """Per term of `large` that `term` is a case of, the columns (n, r) of effects that make it so.

    Where there is none, terms of which each is a case for some levels, the others being those of
    the next; empty if they are not all.
    """
    everywhere = np.ones(len(large.X), bool)
    found = {
        k: image
        for k, other in enumerate(large.terms)
        if (image := _image(term, other, everywhere)) is not None
    }
    return found or _pieces(term, large, everywhere, 0) or {}


def _pieces(
    term: GroupingTerm, large: ModelFrame, left: np.ndarray, start: int
) -> dict[int, np.ndarray] | None:
    """`_images` in the rows `left`, by terms of `large` from `start` on that have effects in whole
    levels of `term` only."""
    if not np.any(term.effects[left]):
        return {}
    for k in range(start, len(large.terms)):
        other = large.terms[k]
        rows = np.any(other.effects != 0, axis=1)
        whole = not np.isin(term.codes[rows], term.codes[~rows]).any()
        if rows.all() or not whole or np.any(rows & ~left):
            continue
        image = _image(term, other, rows)
        rest = None if image is None else _pieces(term, large, left & ~rows, k + 1)
        if image is not None and rest is not None:
            return {k: image, **rest}
    return None


def _image(term: GroupingTerm, other: GroupingTerm, rows: np.ndarray) -> np.ndarray | None:
    """Columns (n, r) of effects on the factor of `other` that make it `term` in `rows`, zero
    outside, or None where Sigma of `other` cannot be chosen so."""
    if other.covariance.word != "us":
        return _structured_image(term, other) if rows.all() else None
    if not _same_kernel(term, other):
        return None
    own, codes = (np.unique(t.codes[rows], return_inverse=True)[1] for t in (term, other))
    effects, of_other = term.effects[rows], other.effects[rows]
    if _cross(own, codes).max() != own.max():
        return None  # a level of `term` is in several of `other`
    if same_partition(own, codes):
        columns = effects
    else:
        kinds = _kinds(own, of_other)
        count = int(kinds.max()) + 1
        if count * effects.shape[1] > of_other.shape[1]:
            return None
        if not same_partition(_cross(codes, kinds), own):
            return None
        split = [effects * (kinds == kind)[:, None] for kind in range(count)]
        columns = np.concatenate(split, axis=1)
    if outside(columns, of_other).any():
        return None
    whole = np.zeros((rows.size, columns.shape[1]))
    whole[rows] = columns
    return whole


def _structured_image(term: GroupingTerm, other: GroupingTerm) -> np.ndarray | None:
    """`_image` where `other` has a word for its covariance: of the same effects with one that is a
    case of it, and of the random intercept that they are if all are equal."""
    if not same_partition(term.codes, other.codes):
        return None
    first, second = term.covariance, other.covariance
    if np.array_equal(term.effects, other.effects):
        own, wider = first.residual_word, second.residual_word
        is_case = first == second or (bool(own) and wider in _WIDER.get(own, ()))
        return term.effects if is_case else None
    alone = term.effects.shape[1] == 1 and np.array_equal(term.effects[:, 0], other.effects.sum(1))
    return term.effects if alone and second.correlated else None


def _kinds(codes: np.ndarray, effects: np.ndarray) -> np.ndarray:
    """The kind of each row, (n,), where rows with equal `effects` are of one kind, and so are those
    of one level."""
    rows = np.unique(effects, axis=0, return_inverse=True)[1].reshape(-1)
    height, width = int(rows.max()) + 1, int(codes.max()) + 1
    links = coo_array((np.ones(rows.size), (rows, height + codes)), (height + width,) * 2)
    return connected_components(links, directed=False)[1][rows]
