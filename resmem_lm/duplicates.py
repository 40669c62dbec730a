"""Near-duplicate texts, found with MinHash (Broder 1997) over word 5-grams, as Lee et al. (2022) do for C4."""

import re
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rensa import RMinHash, RMinHashLSH

T = TypeVar("T")

SHINGLE_WORDS = 5
PERMUTATIONS = 128
BANDS = 32  # a pair of Jaccard similarity s becomes a candidate with probability 1 - (1 - s^4)^32: 0.9998 at 0.7


def minhash(text: str) -> RMinHash:
    """The MinHash signature of the set of the text's word 5-grams (of all its words, if it has fewer)."""
    words = re.findall(r"\w+", text.lower()) or [text]
    shingles = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}
    signature = RMinHash(num_perm=PERMUTATIONS, seed=0)
    signature.update(sorted(shingles))
    return signature


def mark_duplicates(texts: Iterable[tuple[T, str]], *, threshold: float) -> Iterator[tuple[T, bool]]:
    """Yields every label with True when an earlier text has an estimated Jaccard similarity of `threshold` or more.

    The first of several near-duplicates stays, so the answer depends on the order of the texts.
    """
    lsh = RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=BANDS)
    kept: list[RMinHash] = []
    for label, text in texts:
        signature = minhash(text)
        duplicate = any(signature.jaccard(kept[other]) >= threshold for other in lsh.query(signature))
        if not duplicate:
            lsh.insert(len(kept), signature)
            kept.append(signature)
        yield label, duplicate
