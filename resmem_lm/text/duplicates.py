"""Find near-duplicate texts with MinHash (Broder 1997) over word 5-grams, as Lee et al. (2022) do for C4."""

import re

from rensa import RMinHash, RMinHashLSH

SHINGLE_WORDS = 5
PERMUTATIONS = 128
BANDS = 32  # a pair of Jaccard similarity s becomes a candidate with probability 1 - (1 - s^4)^32: 0.9998 at 0.7


def minhash(text: str) -> RMinHash:
    """Return the MinHash signature of the set of word 5-grams of a text. A text of fewer words is one shingle."""
    words = re.findall(r"\w+", text.lower()) or [text]
    shingles = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}
    signature = RMinHash(num_perm=PERMUTATIONS, seed=0)
    signature.update(sorted(shingles))
    return signature


class Signatures:
    """A searchable collection of MinHash signatures."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._lsh = RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=BANDS)
        self._kept: list[RMinHash] = []

    def add(self, signature: RMinHash) -> None:
        """Add the signature of a text."""
        self._lsh.insert(len(self._kept), signature)
        self._kept.append(signature)

    def similar(self, signature: RMinHash) -> list[int]:
        """Return the numbers (0 for the text added first) of the texts with an estimated Jaccard similarity of at least `threshold`."""
        return [other for other in self._lsh.query(signature) if signature.jaccard(self._kept[other]) >= self.threshold]

    def add_new(self, text: str) -> bool:
        """Add a text unless a similar one was added before, and return whether it was added."""
        signature = minhash(text)
        new = not self.similar(signature)
        if new:
            self.add(signature)
        return new
