"""Which texts are nearly the same: MinHash for whole texts, n-grams of words for passages they have in common.

Decides: texts are near-duplicates if their sets of five consecutive words overlap by at least 0.8 (estimated from 64
hashes); a text overlaps with other data if it has 13 consecutive words of it. Hashes are of the words alone, so the
findings are the same on every machine.

Shapes: N texts, W words of a text, H hashes of a signature.
"""

from __future__ import annotations

import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Hashes = NDArray[np.uint64]

SHINGLE_WORDS, PASSAGE_WORDS = 5, 13
SIMILAR = 0.8
_HASHES, _BANDS = 64, 8
_TOGETHER = 4096
_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_GENERATOR = np.random.default_rng(0)
_MULTIPLIERS_H = _GENERATOR.integers(1, 2**63, _HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS_H = _GENERATOR.integers(0, 2**63, _HASHES, dtype=np.uint64)


def word_hashes(text: str) -> Hashes:
    """One number per word, without regard to case and punctuation.

    Args:
        text: any text; a word is letters, digits and underscores.

    Returns:
        CRC-32 of every word, uint64 [W].
    """
    words = _WORD.findall(text.lower())
    crc = (zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words)
    return np.fromiter(crc, dtype=np.uint64, count=len(words))


def ngrams(word_W: Hashes, number: int) -> Hashes:
    """One number for every `number` consecutive words; a shorter text is one n-gram as a whole, an empty one none.

    Args:
        word_W: the words, from `word_hashes`.
        number: words of an n-gram, at least 1.

    Returns:
        uint64 [W - number + 1]; [1] for a shorter text, [0] for an empty one.
    """
    number = min(number, len(word_W))
    if not number:
        return word_W
    with np.errstate(over="ignore"):
        mixed = np.zeros(len(word_W) - number + 1, dtype=np.uint64)
        for place in range(number):
            mixed = (mixed + word_W[place : place + len(mixed)] + np.uint64(1)) * _FACTOR
            mixed ^= mixed >> np.uint64(29)
    return mixed


def signature(text: str) -> NDArray[np.uint32]:
    """The MinHash signature of a text.

    Args:
        text: any text.

    Returns:
        uint32 [H]; zeros for a text without a word. The share of equal numbers in two signatures estimates the overlap
        of their sets of `SHINGLE_WORDS` words.

    Reference:
        Broder 1997, On the resemblance and containment of documents.
    """
    shingles = np.unique(ngrams(word_hashes(text), SHINGLE_WORDS))
    if not len(shingles):
        return np.zeros(_HASHES, dtype=np.uint32)
    smallest_H = np.full(_HASHES, 0xFFFFFFFF, dtype=np.uint32)
    with np.errstate(over="ignore"):
        for start in range(0, len(shingles), 2048):  # bounds the memory for long texts
            part = shingles[start : start + 2048, None] * _MULTIPLIERS_H + _OFFSETS_H
            smallest_H = np.minimum(smallest_H, (part >> np.uint64(32)).min(axis=0).astype(np.uint32))
    return smallest_H


def near_duplicates(texts: Iterable[str]) -> NDArray[np.int64]:
    """For every text the place of an earlier one that it nearly repeats, or -1.

    Texts are compared with the first and the previous one of those that agree in a band of eight hashes, so the time
    grows with the number of texts, not with its square. Signatures lie in a file meanwhile: memory holds some numbers
    of eight bytes for every text.

    Args:
        texts: N texts.

    Returns:
        Places from 0, int64 [N].
    """
    with tempfile.TemporaryFile() as file:
        number = 0
        for text in texts:
            file.write(signature(text).tobytes())
            number += 1
        file.flush()
        if not number:
            return np.empty(0, dtype=np.int64)
        hashes_NH = np.memmap(file, dtype=np.uint32, mode="r", shape=(number, _HASHES))
        found_N: NDArray[np.int64] = np.full(number, -1, dtype=np.int64)
        for band in range(_BANDS):
            keys_N = _band_keys(hashes_NH, band)
            order = np.argsort(keys_N, kind="stable")
            same = keys_N[order[1:]] == keys_N[order[:-1]]
            starts = np.concatenate([[True], ~same])
            first = order[np.maximum.accumulate(np.where(starts, np.arange(number), 0))]
            later = order[1:][same]
            for earlier in (first[1:][same], order[:-1][same]):
                _note(found_N, hashes_NH, later, earlier)
        return found_N


def _band_keys(hashes_NH: NDArray[np.uint32], band: int) -> Hashes:
    """One number for the hashes of a band [N]: equal for equal hashes, and for others hardly ever."""
    width = _HASHES // _BANDS
    keys_N = np.zeros(len(hashes_NH), dtype=np.uint64)
    for start in range(0, len(keys_N), _TOGETHER):
        part = np.asarray(hashes_NH[start : start + _TOGETHER, band * width : (band + 1) * width])
        for column in part.T:
            with np.errstate(over="ignore"):
                mixed = (keys_N[start : start + _TOGETHER] + column + np.uint64(1)) * _FACTOR
            keys_N[start : start + _TOGETHER] = mixed ^ (mixed >> np.uint64(29))
    return keys_N


def _note(
    found_N: NDArray[np.int64], hashes_NH: NDArray[np.uint32], later: NDArray[np.int64], earlier: NDArray[np.int64]
) -> None:
    """Note the earlier text of every later one that it is similar to, if none is known and it does come earlier."""
    open_ones = (found_N[later] < 0) & (earlier < later)
    later, earlier = later[open_ones], earlier[open_ones]
    for start in range(0, len(later), _TOGETHER):
        one, other = later[start : start + _TOGETHER], earlier[start : start + _TOGETHER]
        alike = (hashes_NH[one] == hashes_NH[other]).mean(axis=1) >= SIMILAR
        found_N[one[alike]] = other[alike]


def passages(texts: Iterable[str]) -> Hashes:
    """All passages of 13 words of some texts; texts that are shorter have none.

    Args:
        texts: any number of texts.

    Returns:
        The n-gram of each passage, sorted and each once, uint64 [passages].
    """
    found = [ngrams(words, PASSAGE_WORDS) for words in map(word_hashes, texts) if len(words) >= PASSAGE_WORDS]
    return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.uint64)


def has_passage(texts: Iterable[str], known: Hashes) -> Iterator[bool]:
    """For every text whether it has a passage of 13 words of `known`.

    Args:
        texts: any number of texts.
        known: what `passages` gave for the texts to look for.

    Yields:
        One answer a text, in order.
    """
    for text in texts:
        words = word_hashes(text)
        if len(words) < PASSAGE_WORDS or not len(known):
            yield False
            continue
        own = ngrams(words, PASSAGE_WORDS)
        place = np.minimum(np.searchsorted(known, own), len(known) - 1)
        yield bool((known[place] == own).any())
