"""maketables for fits: import this module once, and `ETable` shows fits as mixed models.

`LMMResults` has the attributes of the package's plug-in format. maketables 0.2 looks at these last,
and takes whatever has `params`, `bse` and `pvalues` for a result of statsmodels before: tables have
the coefficients then, with the tests of `LMMResults.pvalues`, but not the response's name, the
groups and the variance components. Importing this module puts fits first. Needs
``pip install 'jaxreml[maketables]'``.

Example:
    >>> import jaxreml, jaxreml.maketables
    >>> from maketables import ETable
    >>> data = jaxreml.datasets.load("sleepstudy")
    >>> fit = jaxreml.fit("Reaction ~ Days + (Days | Subject)", data)
    >>> [row[1] for row in ETable([fit]).df.index][2:5]
    ['Observations', 'Groups: Subject', 'SD (Intercept) | Subject']
"""

from __future__ import annotations

from typing import Any

from jaxreml.results.results import LMMResults

try:
    from maketables import extractors
except ImportError:
    raise ImportError(
        "jaxreml.maketables needs maketables: pip install 'jaxreml[maketables]'"
    ) from None


class Extractor(extractors.PluginExtractor):
    """The plug-in format's reader, for fits alone."""

    def can_handle(self, model: Any) -> bool:
        """Whether it is a fit."""
        return isinstance(model, LMMResults)


# `register_extractor` puts one at the end, where statsmodels' has taken the fits already.
extractors._EXTRACTOR_REGISTRY.insert(0, Extractor())
