"""Phylogenies: the covariance of species under Brownian motion along their tree."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from jaxreml.errors import DataError
from jaxreml.kernels.known import MOST_LEVELS

_TOKENS = re.compile(r"\s*(\[[^\]]*\]|'(?:[^']|'')*'|[(),:;]|[^\s(),:;\[\]']+)")


def phylogeny(newick: str, *, scale: bool = True) -> pd.DataFrame:
    """Covariance of species from their tree: the length of the branches that two have in common,
    from the root on. It is that of a trait that drifts along the tree at random (Felsenstein 1985,
    American Naturalist 125:1).

    Args:
        newick: the tree in the Newick format, with lengths of branches:
            ``"((human:6,chimp:6):2,gorilla:8);"``. In names a blank may be written as _, which is
            left as it is.
        scale: divide by the largest length from the root to a species, so that variances are 1 in
            a tree whose species are all of today.

    Returns:
        A frame with the species on both sides, for ``kernels=``.

    Raises:
        DataError: no Newick, branches without length, species without name or twice.

    Examples:
        >>> from jaxreml import kernels
        >>> kernels.phylogeny("((human:6,chimp:6):2,gorilla:8);")
                 human  chimp  gorilla
        human     1.00   0.25      0.0
        chimp     0.25   1.00      0.0
        gorilla   0.00   0.00      1.0
    """
    names, parents, lengths = _read(newick)
    count = len(parents)
    leaves = np.setdiff1d(np.arange(count), parents)
    species = [names[k] for k in leaves]
    if not all(species):
        raise DataError("the tree has a species without a name")
    index = pd.Index(species)
    if index.has_duplicates:
        raise DataError(f"the tree has the species {index[index.duplicated()][0]!r} twice")
    if len(leaves) < 2:
        raise DataError("the tree has no two species")
    if len(leaves) > MOST_LEVELS:
        raise DataError(f"the tree has {len(leaves)} species; {MOST_LEVELS} are the most")
    # The species of a node stand side by side, and share the way from the root to it.
    after = np.arange(1, count + 1)  # the node after the last one below each
    for k in range(count - 1, 0, -1):
        after[parents[k]] = max(after[parents[k]], after[k])
    first, last = np.searchsorted(leaves, np.arange(count)), np.searchsorted(leaves, after)
    matrix, depth = np.zeros((len(leaves),) * 2), np.zeros(count)
    for k in range(1, count):  # parents come first
        depth[k] = depth[parents[k]] + lengths[k]
        matrix[first[k] : last[k], first[k] : last[k]] = depth[k]
    if scale:
        matrix /= matrix.max()
    return pd.DataFrame(matrix, index, index)


def _read(newick: str) -> tuple[list[str], list[int], np.ndarray]:
    """Names, parents and lengths of the nodes, the root first, which is its own parent."""
    text = newick.strip().rstrip(";")
    tokens = [token for token in _TOKENS.findall(text) if not token.startswith("[")]
    if not tokens or re.fullmatch(rf"(?:{_TOKENS.pattern})+\s*", text) is None:
        raise DataError("the tree is no Newick text, such as '((a:1,b:1):1,c:2);'")
    names, parents, lengths = [""], [0], [np.nan]
    node, depth, position = 0, 0, 0
    while position < len(tokens):
        token = tokens[position]
        if token == "(":
            names, parents, lengths = [*names, ""], [*parents, node], [*lengths, np.nan]
            node, depth = len(names) - 1, depth + 1
        elif token == ",":
            parent = parents[node]
            names, parents, lengths = [*names, ""], [*parents, parent], [*lengths, np.nan]
            node = len(names) - 1
        elif token == ")":
            node, depth = parents[node], depth - 1
        elif token == ":":
            position += 1
            lengths[node] = _length(tokens[position] if position < len(tokens) else "", names[node])
        else:
            names[node] = token.strip("'").replace("''", "'") if token[0] == "'" else token
        if depth < 0 or (depth == 0 and token == ","):
            raise DataError("the tree is no Newick text: its brackets do not match")
        position += 1
    if depth:
        raise DataError("the tree is no Newick text: its brackets do not match")
    lengths[0] = 0.0  # above the root
    unknown = np.flatnonzero(np.isnan(lengths))
    if unknown.size:
        raise DataError(
            f"{unknown.size} branches of the tree have no length (the first is that of "
            f"{names[unknown[0]] or 'a node without name'!r}); give every one a length, as in 'a:1'"
        )
    return names, parents, np.array(lengths)


def _length(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not (np.isfinite(value) and value >= 0):
        raise DataError(f"the length of the branch of {name!r} is {text!r}, no number from 0 on")
    return value
