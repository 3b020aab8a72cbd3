"""Contract: words and the numbers that stand for them in a model's tensor.

Rules:
* training and serving read a word by the same function, so what was one category there is one here;
* category i is the number i; what the schema does not know is one number more than the last, or refused;
* the words that mean a gap in a table mean a gap here too, and are no categories.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from .codes import DataError

MAX_CATEGORIES: Final = 4_096  # of one feature
MAX_INFERRED: Final = 100  # that are taken for categories without being called so
MAX_WORD: Final = 128  # characters
_GAPS: Final = frozenset({"", "na", "n/a", "nan", "null", "none"})


def category(text: str) -> str | None:
    """The word in `text`: without spaces around it, composed (NFC); None for what means a gap."""
    word = unicodedata.normalize("NFC", text.strip())
    return None if word.lower() in _GAPS else word


def check_categories(name: str, words: Sequence[str]) -> None:
    """Refuse what can't be the categories of feature `name`.

    Raises:
        DataError: data.category.
    """
    if not 0 < len(words) <= MAX_CATEGORIES:
        message = f"Feature {name!r}: expected 1 to {MAX_CATEGORIES} categories, found {len(words)}."
        raise DataError("data.category", message)
    for word in words:
        if len(word) > MAX_WORD or not word.isprintable() or category(word) != word:
            message = f"Feature {name!r}: {word[:40]!r} is no category: expected 1 to {MAX_WORD} printable characters, "
            message += "without spaces around them, and no word for a gap."
            raise DataError("data.category", message)
    if len(set(words)) != len(words):
        twice = next(word for word, n in Counter(words).items() if n > 1)
        raise DataError("data.category", f"Feature {name!r}: category {twice!r} occurs twice.")


def infer_categories(name: str, words: Iterable[str | None], *, most: int = MAX_INFERRED) -> tuple[str, ...]:
    """The categories in a column of words that `category` read, sorted, gaps left out.

    Raises:
        DataError: data.category for more than `most`, or for none.
    """
    found = sorted({word for word in words if word is not None})
    if len(found) > most:
        some = ", ".join(repr(word[:20]) for word in found[:3])
        message = f"Column {name!r}: expected at most {most} categories, found {len(found)} ({some} …)."
        raise DataError("data.category", message, remedy="Drop the column, if it is text or an identifier.")
    check_categories(name, found)
    return tuple(found)


def encode_words(
    name: str, words: Sequence[str | None], index: Mapping[str, int], *, unknown: int | None
) -> npt.NDArray[np.float32]:
    """The numbers that stand for `words`, float32 `[n]`, NaN for a gap.

    Args:
        name: of the feature, for the error.
        words: as `category` read them.
        index: the number of each category.
        unknown: the number of whatever is no category; None refuses it.

    Raises:
        DataError: data.category.
    """
    codes = np.empty(len(words), dtype=np.float32)
    for i, word in enumerate(words):
        code = np.nan if word is None else index.get(word, unknown)
        if code is None:
            known = ", ".join(repr(w[:20]) for w in list(index)[:10])
            rest = " …" if len(index) > 10 else ""
            message = f"Row {i}: feature {name!r}: expected one of {known}{rest}; found {str(word)[:40]!r}."
            raise DataError("data.category", message)
        codes[i] = code
    return codes
