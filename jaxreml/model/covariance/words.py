"""Words for covariances, as formulas have them: of random effects, ``ar1(0 + visit | subject)``,
and of residuals, ``residual="ar1(visit | subject)"``.

Programs differ in what a word says of variances. Of random effects, words are those of glmmTMB and
lme4 2.0, where `cs` and `toep` have a variance for each effect; of residuals, those of SAS and
mmrm, where these have one and `csh` and `toeph` one for each. `FAMILIES` has both readings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxreml.errors import DataError, FormulaError
from jaxreml.model.covariance import correlations
from jaxreml.model.covariance.base import Block
from jaxreml.model.covariance.correlations import Correlation
from jaxreml.model.covariance.distances import Distance
from jaxreml.model.covariance.factor_analytic import FactorAnalytic
from jaxreml.model.covariance.own import Custom
from jaxreml.model.covariance.structured import Structured
from jaxreml.model.covariance.unstructured import Unstructured

Places = tuple[Any, ...]  # of the effects: a number or a tuple of coordinates each
EACH, ONE, NONE = True, False, None


class Family(NamedTuple):
    """What a word says.

    Attributes:
        correlation: made from the number of effects or visits, and their places.
        random: whether every effect has a variance of its own, where the word is used of random
            effects; None if it is not.
        residual: the same of visits, where it is used of residuals.
        meaning: in words.
        timed: whether effects or visits are at numbers, whose distances count.
        ordered: whether their order counts.
    """

    correlation: Callable[[int, Places], Correlation]
    random: bool | None
    residual: bool | None
    meaning: str
    timed: bool = False
    ordered: bool = False


def _plain(kind: Callable[[int], Correlation]) -> Callable[[int, Places], Correlation]:
    return lambda size, places: kind(size)


def _distance(shape: str) -> Callable[[int, Places], Correlation]:
    return lambda size, places: Distance(size, places, shape)


_ANY, _NO = _plain(correlations.Unrestricted), _plain(correlations.Independent)
_EQUAL, _LAG = _plain(correlations.Exchangeable), _plain(correlations.Autoregressive)
_NEXT, _BANDS = _plain(correlations.Antedependent), _plain(correlations.Toeplitz)

FAMILIES = {
    "us": Family(_ANY, EACH, EACH, "any covariance matrix"),
    "diag": Family(_NO, EACH, EACH, "no correlation"),
    "homdiag": Family(_NO, ONE, NONE, "no correlation"),
    "cs": Family(_EQUAL, EACH, ONE, "equal correlations"),
    "homcs": Family(_EQUAL, ONE, ONE, "equal correlations"),
    "csh": Family(_EQUAL, EACH, EACH, "equal correlations"),
    "ar1": Family(_LAG, ONE, ONE, "correlations rho^|i - j|", ordered=True),
    "hetar1": Family(_LAG, EACH, EACH, "correlations rho^|i - j|", ordered=True),
    "ar1h": Family(_LAG, EACH, EACH, "correlations rho^|i - j|", ordered=True),
    "ad": Family(_NEXT, NONE, ONE, "ante-dependence", ordered=True),
    "adh": Family(_NEXT, NONE, EACH, "ante-dependence", ordered=True),
    "toep": Family(_BANDS, EACH, ONE, "a correlation for each lag", ordered=True),
    "homtoep": Family(_BANDS, ONE, ONE, "a correlation for each lag", ordered=True),
    "toeph": Family(_BANDS, EACH, EACH, "a correlation for each lag", ordered=True),
    "ou": Family(_distance("exponential"), ONE, NONE, "exp(-distance / range)", timed=True),
    "exp": Family(_distance("exponential"), ONE, NONE, "exp(-distance / range)", timed=True),
    "gau": Family(_distance("gaussian"), ONE, NONE, "exp(-(distance / range)^2)", timed=True),
    "mat": Family(_distance("matern3"), ONE, NONE, "Matern's correlations", timed=True),
    "sp_exp": Family(_distance("exponential"), NONE, ONE, "exp(-distance / range)", timed=True),
    "sp_gau": Family(_distance("gaussian"), NONE, ONE, "exp(-(distance / range)^2)", timed=True),
}
RANKED = "rr"  # the word for reduced rank, of random effects
RANDOM = (*(word for word, own in FAMILIES.items() if own.random is not None), RANKED)
RESIDUALS = tuple(word for word, own in FAMILIES.items() if own.residual is not None)
SYNONYMS = {"homcs": "cs", "hetar1": "ar1h", "homtoep": "toep"}  # of residuals
HOMOGENEOUS = ("diag", "cs", "ar1", "toep")  # words of random effects that take `hom`
SMOOTHNESS = {0.5: "exponential", 1.5: "matern3", 2.5: "matern5"}


def is_timed(word: str) -> bool:
    """Whether the effects of a word are at numbers, whose distances count."""
    return word in FAMILIES and FAMILIES[word].timed


def own_covariance(word: str, context: Mapping[str, Any] | None) -> Custom | None:
    """A covariance of the user's own by that name, if there is one.

    Raises:
        FormulaError: it has the name of one that there is.
    """
    own = (context or {}).get(word)
    if not isinstance(own, Custom):
        return None
    if word in FAMILIES or word in RANDOM:
        raise FormulaError(f"{word!r} is a covariance that there is: call your own by another name")
    return own


def check_word(word: str, options: Mapping[str, Any], context: Mapping[str, Any]) -> None:
    """Raise FormulaError for a word or options that a random term cannot have, named."""
    own = own_covariance(word, context)
    if own is None and word not in RANDOM:
        hint = ", or is a + missing before the brackets?"
        if word in RESIDUALS:
            hint = f"; {word!r} is a word for residuals: residual='{word}(visit | subject)'"
        raise FormulaError(
            f"{word!r} is no covariance of random effects; there are {', '.join(RANDOM)}{hint}"
        )
    usual = ["hom"] if word in HOMOGENEOUS else []
    known = [] if own is not None else {"mat": ["nu"], RANKED: ["d"]}.get(word, usual)
    for name, value in options.items():
        if name not in known:
            takes = f"takes the option {', '.join(known)}" if known else "takes no options"
            raise FormulaError(f"{word}(..., {name}={value!r}): {word!r} {takes}")
        if name == "hom" and not isinstance(value, bool):
            raise FormulaError(f"{word}(..., hom={value!r}): hom is True or False")
        if name == "nu" and value not in SMOOTHNESS:
            raise FormulaError(
                f"mat(..., nu={value!r}): the smoothness nu is one of "
                f"{', '.join(map(str, SMOOTHNESS))}"
            )


def covariance_of(
    word: str,
    options: Mapping[str, Any],
    context: Mapping[str, Any],
    size: int,
    places: Places = (),
) -> Block:
    """The covariance of a random term's effects.

    Args:
        word: of `FAMILIES`.
        options: its keyword arguments in the formula.
        context: names that the formula may use besides columns.
        size: number of effects.
        places: of the effects, where their distances count; labels of those of a user's own.

    Raises:
        FormulaError: a word or options that there are not.
        DataError: too few effects.
    """
    check_word(word, options, context)
    users = own_covariance(word, context)
    if users is not None:
        return users.term(size, places or None)
    if word == "us":
        return Unstructured(size)
    if word == RANKED:
        rank = options.get("d", 2)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank < size:
            raise DataError(
                f"rr(..., d={rank!r}) of {size} effects: the rank d is a whole number from 1 to "
                f"{size - 1}, fewer than effects"
            )
        return FactorAnalytic(size, rank)
    own = FAMILIES[word]
    each = not options["hom"] if "hom" in options else bool(own.random)
    made = own.correlation
    if "nu" in options:
        made = _distance(SMOOTHNESS[options["nu"]])
    if size < 2 and word not in ("diag", "homdiag"):
        raise DataError(f"{word!r} is a covariance of two or more effects of a term, not of one")
    return Structured(size, made(size, places), each)


class TermCovariance(NamedTuple):
    """What a random term says of its covariance.

    Attributes:
        word, options: as `covariance_of` takes them, the options as pairs.
        places: of the effects.
    """

    word: str = "us"
    options: tuple[tuple[str, Any], ...] = ()
    places: Places = ()

    def block(self, size: int, context: Mapping[str, Any] | None = None) -> Block:
        """As `covariance_of` makes it."""
        return covariance_of(self.word, dict(self.options), context or {}, size, self.places)

    @property
    def each(self) -> bool | None:
        """Whether every effect has a variance of its own; None where the word says neither."""
        if self.word not in FAMILIES:
            return None
        options = dict(self.options)
        return not options["hom"] if "hom" in options else FAMILIES[self.word].random

    @property
    def correlated(self) -> bool:
        """Whether all correlations can be 1, and all variances equal."""
        return self.word in FAMILIES and self.word not in ("diag", "homdiag")

    @property
    def residual_word(self) -> str:
        """What SAS and mmrm call it; "" for a covariance that they have no word for."""
        if self.word in ("us", "homdiag"):
            return self.word
        for word, own in FAMILIES.items():
            same = self.word in FAMILIES and own.correlation is FAMILIES[self.word].correlation
            if same and not own.timed and own.residual == self.each and word not in SYNONYMS:
                return word
        return ""

    @property
    def prefix(self) -> str:
        """What stands before the brackets in a formula."""
        return "" if self.word == "us" else self.word

    @property
    def text(self) -> str:
        """In words, for summaries: "" for any covariance matrix."""
        if self.word == "us":
            return ""
        options = "".join(f", {name}={value!r}" for name, value in self.options)
        if self.word == RANKED:
            return f"{RANKED}{options}: loadings on fewer factors than effects"
        if self.word not in FAMILIES:
            return f"{self.word}{options}"
        variances = "a variance for each effect" if self.each else "one variance for all effects"
        return f"{self.word}{options}: {FAMILIES[self.word].meaning}, {variances}"


ANY = TermCovariance()
