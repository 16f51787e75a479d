"""lme4's formula grammar, taken apart: text in, parts out, no data.

The random terms, ``(effects | group)``, ``(effects || group)`` and ``word(effects | group)`` with a
word for a covariance, and the offsets are cut out of the right side; what is left is a
fixed-effects formula for formulaic, and so are the effects inside the bars.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from formulaic.transforms import TRANSFORMS

from jaxreml.errors import FormulaError
from jaxreml.model.covariance.words import FAMILIES

_OPEN, _CLOSE = "([{", ")]}"
_NAME = re.compile(r"`[^`]+`|[^\W\d]\w*", re.UNICODE)
QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'|`[^`]*`")
# Functions, which have no bar of a random term inside
FUNCTIONS = {*TRANSFORMS, "offset", "factor"} - set(FAMILIES)
RESIDUAL = "Residual"  # what the residual variance is called among the grouping factors


@dataclass(frozen=True)
class RandomTerm:
    """One bar of a formula.

    Attributes:
        effects: text left of the bar, a formulaic right side.
        factors: names of the columns whose combinations are the levels: one, or several for
            ``a:b``, the outermost last as lme4 names them (``cask:batch`` for ``batch/cask``).
        name: the grouping factor's name as lme4 gives it; a column called Residual is
            "`Residual`", not to be taken for the residual.
        correlated: whether the effects are one term (one bar) or several (two).
        word: for their covariance, "" for brackets alone.
        options: names and values of the word's keyword arguments.
    """

    effects: str
    factors: tuple[str, ...]
    name: str
    correlated: bool
    word: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    def text(self, factors: str) -> str:
        """As a formula has it, for a grouping factor in words."""
        bar = "|" if self.correlated else "||"
        options = "".join(f", {name}={value!r}" for name, value in self.options)
        return f"{self.word}({self.effects} {bar} {factors}{options})"


@dataclass(frozen=True)
class ParsedFormula:
    """The parts of a formula.

    Attributes:
        text: the formula as given, powers as Python writes them.
        response: text of the left side, "" if there is none.
        fixed: text of the fixed effects, a formulaic right side.
        offsets: texts inside ``offset()``.
        random: random terms in the order written.
    """

    text: str
    response: str
    fixed: str
    offsets: tuple[str, ...]
    random: tuple[RandomTerm, ...]


def parse(formula: str, *, need_random: bool = True) -> ParsedFormula:
    """Take a formula apart.

    Args:
        formula: its text.
        need_random: whether one without a random term is refused.

    Raises:
        FormulaError: brackets that do not match, no or several ``~``, a bar outside brackets,
            nested or multiplied bars, a random term that is subtracted, or no random term.
    """
    if not isinstance(formula, str):
        raise FormulaError(
            f"the formula must be a string, not {type(formula).__name__}; it comes first, the data "
            "second"
        )
    text = _outside_quotes(r"\s+|\^", lambda piece: "**" if piece == "^" else " ", formula).strip()
    sides = [piece for piece, _ in _split(text, "~")]
    if len(sides) != 2:
        raise FormulaError(
            f"the formula {text!r} must have exactly one ~, as in 'y ~ x + (x | group)'"
        )
    response, right = sides
    if _count_bars(response):
        raise FormulaError(f"{response!r}, the left side of the formula, contains a bar")
    fixed: list[str] = []
    offsets: list[str] = []
    random: list[RandomTerm] = []
    _collect(right, fixed, offsets, random)
    if need_random and not random:
        remedy = "add one such as (1 | group), or use least squares"
        if "|" in right:  # as in "x (1 | g)", which reads as a call of the function x
            remedy = "is a + missing before the brackets with a bar?"
        raise FormulaError(f"the formula {text!r} has no random term; {remedy}")
    fixed_text = " ".join(fixed).removeprefix("+ ") or "1"
    return ParsedFormula(text, response, fixed_text, tuple(offsets), tuple(random))


def _outside_quotes(pattern: str, change: Callable[[str], str], text: str) -> str:
    """Change what matches a pattern, but not inside quotes or backticks.

    Blanks become one; R's x^2 becomes x**2, as Python's ^ would silently be another between
    integers.
    """
    either = re.compile(f"({QUOTED.pattern})|{pattern}")
    return either.sub(lambda found: found[1] or change(found[0]), text)


def _collect(right: str, fixed: list[str], offsets: list[str], random: list[RandomTerm]) -> None:
    """Sort the summands of a right side into fixed effects, offsets and random terms."""
    pieces = _split(right, "+-")
    for k, (piece, operator) in enumerate(pieces):
        if not piece:
            if k == 0 and len(pieces) > 1:  # a sign at the start, as in ~ -1 + x
                continue
            raise FormulaError(f"a term is missing after {operator or '~'!r} in {right!r}")
        here = operator or "+"
        covariance = _covariance_term(piece)
        if covariance is not None:
            if here == "-":
                raise FormulaError(f"a random term cannot be subtracted: - {piece}")
            random.extend(covariance)
            continue
        inner = _unwrap(piece)
        bars = _count_bars(piece)
        if bars == 0:
            call = re.fullmatch(r"offset\s*\((.*)\)", piece, re.DOTALL)
            if call is None:
                fixed += [here, piece]
            elif here == "-":
                raise FormulaError(f"an offset cannot be subtracted: {piece!r}")
            else:
                offsets.append(call.group(1).strip())
        elif inner is None:
            if any(bar for _, bar in _split(piece, "|")):
                raise FormulaError(
                    f"the bar in {piece!r} is outside brackets; write random terms as (x | group)"
                )
            raise FormulaError(
                f"random terms can only be added, not multiplied or crossed: {piece!r}"
            )
        elif here == "-":
            raise FormulaError(f"a random term cannot be subtracted: - {piece}")
        elif any(bar for _, bar in _split(inner, "|")):
            random.extend(_random_terms(inner))
        else:
            _collect(inner, fixed, offsets, random)


def _covariance_term(piece: str) -> list[RandomTerm] | None:
    """The random terms of ``word(effects | group, option=value)``; None for anything else."""
    call = re.fullmatch(r"([^\W\d]\w*)\s*(\(.*\))", piece, re.DOTALL)
    inner = None if call is None else _unwrap(call[2])
    if call is None or inner is None or call[1] in FUNCTIONS:
        return None
    if call[1] not in FAMILIES and piece[len(call[1])] != "(":  # x (1 | g): is a + missing?
        return None
    if not any(bar for _, bar in _split(inner, "|")):
        return None
    bars, *rest = [part for part, _ in _split(inner, ",")]
    options = {}
    for part in rest:
        name, _, value = (text.strip() for text in part.partition("="))
        try:
            options[name] = ast.literal_eval({"TRUE": "True", "FALSE": "False"}.get(value, value))
        except (ValueError, SyntaxError):
            raise FormulaError(
                f"{part!r} in {piece!r} is not an option such as hom=True or d=2"
            ) from None
    if re.search(r"\|\s*\|", bars):
        raise FormulaError(f"{piece!r}: a word for a covariance goes with one bar")
    return _random_terms(bars, call[1], tuple(options.items()))


def _random_terms(
    inner: str, word: str = "", options: tuple[tuple[str, Any], ...] = ()
) -> list[RandomTerm]:
    """The random terms of the text inside one pair of brackets; several for ``a/b``."""
    parts = [piece for piece, _ in _split(inner, "|")]
    correlated = not (len(parts) == 3 and not parts[1] and re.search(r"\|\|", inner))
    if not correlated:
        parts = [parts[0], parts[2]]
    if len(parts) != 2 or any(_count_bars(part) for part in parts):
        raise FormulaError(f"nested bars: ({inner}); a random term has one bar, (effects | group)")
    effects, group = parts
    if not effects or not group:
        raise FormulaError(f"({inner}) needs effects before the bar and a grouping factor after it")
    outer: tuple[str, ...] = ()
    outer_name = ""
    terms = []
    for level, _ in _split(_strip(group), "/"):
        factors = tuple(_factor(name, group) for name, _ in _split(_strip(level), ":"))
        name = ":".join(factors)
        name = f"`{name}`" if name == RESIDUAL else name
        if outer:
            name = f"{name}:({outer_name})" if ":" in outer_name else f"{name}:{outer_name}"
        outer = (*factors, *outer)
        outer_name = name
        terms.append(RandomTerm(effects, outer, name, correlated, word, options))
    return terms


def _factor(name: str, group: str) -> str:
    call = re.fullmatch(r"(?:factor|as\.factor|C)\((.*)\)", name, re.DOTALL)
    name = call.group(1).strip() if call else name
    if not _NAME.fullmatch(name):
        raise FormulaError(
            f"{name!r} in the grouping factor {group!r} is not a column name; grouping factors are "
            "columns joined by : or /, in backticks if their names have spaces or dots, as in "
            f"(1 | `{name}`)"
        )
    return name.strip("`")


def single_name(text: str) -> str | None:
    """The name that a text consists of, without backticks; None for any other expression."""
    text = text.strip()
    return text.strip("`") if _NAME.fullmatch(text) else None


def dotted_names(expression: str) -> list[str]:
    """Names with dots that stand without backticks, functions left out: ``age.group``."""
    text = QUOTED.sub(" ", expression)
    found = re.finditer(r"(?<![\w.])([^\W\d]\w*(?:\.\w+)+)(?!\w|\s*\()", text)
    return list(dict.fromkeys(match[1] for match in found))


def _strip(text: str) -> str:
    while (inner := _unwrap(text)) is not None:
        text = inner
    return text


def _unwrap(piece: str) -> str | None:
    """The text inside brackets that span the whole piece, or None."""
    if not (piece.startswith("(") and piece.endswith(")")):
        return None
    depths = list(_depths(piece))
    spans = all(depth > 0 for _, depth, _ in depths[:-1])
    return piece[1:-1].strip() if spans else None


def _count_bars(text: str) -> int:
    """Bars that belong to the formula, not to Python code inside a function call."""
    return sum(character == "|" and not in_call for character, _, in_call in _depths(text))


def _split(text: str, separators: str) -> list[tuple[str, str]]:
    """Split outside brackets and quotes: pieces, each with the separator before it."""
    pieces = []
    piece = ""
    before = ""
    for character, depth, _ in _depths(text):
        if depth == 0 and character in separators:
            pieces.append((piece.strip(), before))
            piece, before = "", character
        else:
            piece += character
    return [*pieces, (piece.strip(), before)]


def _depths(text: str):
    """Each character with its bracket depth after it and whether it is inside a call's brackets.

    Characters inside quotes or backticks come with depth 1 or more.
    """
    stack: list[tuple[str, bool]] = []
    quote = ""
    previous = ""
    for character in text:
        in_call = any(call for _, call in stack)
        if quote:
            quote = "" if character == quote else quote
            yield character, len(stack) + 1, in_call or character == "|"
            previous = character
            continue
        if character in "\"'`":
            quote = character
            yield character, len(stack) + 1, in_call
        elif character in _OPEN:
            stack.append((character, character != "(" or bool(re.match(r"[\w`\])]", previous))))
            yield character, len(stack), in_call
        elif character in _CLOSE:
            if not stack or _OPEN.index(stack[-1][0]) != _CLOSE.index(character):
                raise FormulaError(f"{character!r} closes no bracket in {text!r}")
            stack.pop()
            yield character, len(stack), in_call
        else:
            yield character, len(stack), in_call
        if not character.isspace():
            previous = character
    if stack or quote:
        raise FormulaError(f"{quote or stack[-1][0]!r} is never closed in {text!r}")


def names_in(expression: str) -> list[str]:
    """Names in an expression that can be columns: not functions, keywords or string contents."""
    found = []
    for match in re.finditer(rf"({QUOTED.pattern})|(?<![\w.])([^\W\d]\w*)", expression):
        quoted, name = match.groups()
        if quoted:
            found += [quoted[1:-1]] if quoted[0] == "`" and len(quoted) > 2 else []
            continue
        rest = expression[match.end() :].lstrip()
        is_keyword_argument = rest.startswith("=") and not rest.startswith("==")
        if rest[:1] in ("(", ".") or is_keyword_argument:
            continue
        if name not in ("True", "False", "None", "and", "or", "not", "in", "is", "if", "else"):
            found.append(name)
    return list(dict.fromkeys(found))
