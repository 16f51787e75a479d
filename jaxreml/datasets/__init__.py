"""Bundled example data: the classic data sets of the mixed-model literature, as in R.

The values come from the publications named in `SOURCES`; the copies are those distributed with
the R packages lme4 and nlme (both under the GPL). Pinheiro and Bates (2000) there is
Mixed-Effects Models in S and S-PLUS, Springer. Columns, rows and factor levels stand in R's
order. `tests/reference/make_datasets.R` writes the files.
"""

from __future__ import annotations

import difflib
import json
import lzma
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pandas

__all__ = ["SOURCES", "Source", "load", "names"]


class Source(NamedTuple):
    """Where a data set comes from, and the model that textbooks fit to it.

    Examples:
        >>> source = jaxreml.datasets.SOURCES["dyestuff"]
        >>> source.title
        'Yield of dyestuff from six batches of an intermediate product'
        >>> source.formula
        'Yield ~ 1 + (1 | Batch)'
    """

    title: str
    source: str
    formula: str


SOURCES: dict[str, Source] = {
    "dyestuff": Source(
        "Yield of dyestuff from six batches of an intermediate product",
        "O.L. Davies and P.L. Goldsmith (eds.), Statistical Methods in Research and Production,"
        " 4th ed., Oliver & Boyd, 1972, section 6.4; R package lme4, Dyestuff.",
        "Yield ~ 1 + (1 | Batch)",
    ),
    "dyestuff2": Source(
        "Simulated yields whose between-batch variance is estimated as zero",
        "G.E.P. Box and G.C. Tiao, Bayesian Inference in Statistical Analysis, Addison-Wesley,"
        " 1973, section 5.1.2; R package lme4, Dyestuff2.",
        "Yield ~ 1 + (1 | Batch)",
    ),
    "sleepstudy": Source(
        "Reaction times (ms) over ten days of sleep restriction, 18 subjects",
        "G. Belenky et al., Patterns of performance degradation and restoration during sleep"
        " restriction and subsequent recovery, Journal of Sleep Research 12 (2003) 1-12;"
        " R package lme4, sleepstudy.",
        "Reaction ~ Days + (Days | Subject)",
    ),
    "penicillin": Source(
        "Growth inhibition by six penicillin samples on 24 assay plates (crossed)",
        "O.L. Davies and P.L. Goldsmith (eds.), Statistical Methods in Research and Production,"
        " 4th ed., Oliver & Boyd, 1972, section 6.6; R package lme4, Penicillin.",
        "diameter ~ 1 + (1 | plate) + (1 | sample)",
    ),
    "pastes": Source(
        "Strength of a chemical paste, casks nested in delivery batches",
        "O.L. Davies and P.L. Goldsmith (eds.), Statistical Methods in Research and Production,"
        " 4th ed., Oliver & Boyd, 1972, section 6.5; R package lme4, Pastes.",
        "strength ~ 1 + (1 | batch/cask)",
    ),
    "cake": Source(
        "Breaking angle of chocolate cakes by recipe and baking temperature (split plot)",
        "F.E. Cook, Chocolate cake: I. Optimum baking temperature, MS thesis, Iowa State College,"
        " 1938, printed in W.G. Cochran and G.M. Cox, Experimental Designs, 2nd ed., Wiley, 1957,"
        " p. 300; R package lme4, cake.",
        "angle ~ recipe * temp + (1 | recipe:replicate)",
    ),
    "orthodont": Source(
        "Distance from pituitary to pterygomaxillary fissure (mm) of 27 children at four ages",
        "R.F. Potthoff and S.N. Roy, A generalized multivariate analysis of variance model useful"
        " especially for growth curve problems, Biometrika 51 (1964) 313-326"
        " (Pinheiro and Bates 2000, appendix A.17); R package nlme, Orthodont.",
        "distance ~ age * Sex + (age | Subject)",
    ),
    "machines": Source(
        "Productivity scores of six workers on each of three machines",
        "G.A. Milliken and D.E. Johnson, Analysis of Messy Data, Volume I: Designed Experiments,"
        " Chapman & Hall, 1992 (Pinheiro and Bates 2000, appendix A.14); R package nlme, Machines.",
        "score ~ Machine + (1 | Worker) + (1 | Worker:Machine)",
    ),
    "oxide": Source(
        "Oxide layer thickness at three sites on wafers nested in lots",
        "R.C. Littell, G.A. Milliken, W.W. Stroup and R.D. Wolfinger, SAS System for Mixed Models,"
        " SAS Institute, 1996 (Pinheiro and Bates 2000, appendix A.20); R package nlme, Oxide.",
        "Thickness ~ 1 + (1 | Lot/Wafer)",
    ),
    "insteval": Source(
        "73421 evaluations of lecturers by students at ETH Zurich (large, crossed)",
        "University lecture evaluations by students at ETH Zurich, anonymised; R package lme4,"
        " InstEval.",
        "y ~ service + (1 | s) + (1 | d) + (1 | dept)",
    ),
}


def names() -> list[str]:
    """Return the names that `load` takes.

    Examples:
        >>> jaxreml.datasets.names()[:4]
        ['dyestuff', 'dyestuff2', 'sleepstudy', 'penicillin']
    """
    return list(SOURCES)


def load(name: str) -> pandas.DataFrame:
    """Read a bundled data set into a fresh data frame.

    Factors are Categorical columns of strings with R's levels in R's order. They are ordered
    where R's are, except the grouping factors `Subject` and `Worker` of nlme, which R orders for
    plots only.

    Args:
        name: one of `names()`, in upper or lower case.

    Returns:
        A new frame on each call, rows numbered from 0.

    Raises:
        ValueError: no data set has this name.

    Examples:
        >>> jaxreml.datasets.load("sleepstudy").head(2)
           Reaction  Days Subject
        0  249.5600   0.0     308
        1  258.7047   1.0     308
        >>> jaxreml.datasets.load("cake")["recipe"].cat.categories.tolist()
        ['A', 'B', 'C']
    """
    key = name.lower()
    if key not in SOURCES:
        near = difflib.get_close_matches(key, SOURCES, n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"No data set is named {name!r}.{hint} There are: {', '.join(SOURCES)}.")

    import numpy as np
    import pandas as pd

    packed = resources.files(__name__).joinpath(f"{key}.json.xz").read_bytes()
    columns = {}
    for label, column in json.loads(lzma.decompress(packed)).items():
        if column["kind"] == "factor":
            columns[label] = pd.Categorical.from_codes(
                np.asarray(column["values"]),
                categories=column["levels"],
                ordered=column["ordered"],
            )
        else:
            dtype = np.int64 if column["kind"] == "integer" else np.float64
            columns[label] = np.asarray(column["values"], dtype=dtype)
    return pd.DataFrame(columns)
