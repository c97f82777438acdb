"""Texts that are nearly the same: shingles, MinHash, bands, and the exact Jaccard similarity of what they propose.

A word is a maximal run of word characters, also of a single one (the digits of a price count); a shingle is three words
that follow one another; the similarity of two texts is the Jaccard similarity of their sets of shingles.  A text of
fewer than three words has no shingle and is like nothing.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from pipeline.kernels.text import FNV_OFFSET, FNV_PRIME, GOLDEN, code_point, mixed

WORDS = 3  # of a shingle: one changed word of n costs three shingles of n
HASHES = 64  # of a signature
CERTAINTY = 0.95  # that a pair of exactly the wanted similarity is proposed
TRIED = 16  # texts of one bucket that a text is compared with: a template in thousands of texts must not be squared


class Known(NamedTuple):
    """The texts that others are compared with, by band keys.  Texts with the same shingles stand once."""

    identity: np.ndarray  # (m,) uint64 ascending
    keys: np.ndarray  # (bands, m) uint64, each row ascending
    owner: np.ndarray  # (bands, m) int64: the text of each key; ascending where keys are equal
    start: np.ndarray  # (m,) int64: where the shingles of a text begin in `sets`
    size: np.ndarray  # (m,) int64: how many they are


def bands(similarity: float) -> tuple[int, int]:
    """(bands, hashes a band): the most selective that propose a pair of this similarity with probability >= 0.95.

    A pair of similarity s shares a band of r hashes with probability s^r (Leskovec, Rajaraman, Ullman: Mining of
    Massive Datasets, 3.4).  Below a similarity of 0.046 the bands of one hash are the best there is, and find less.

    >>> bands(0.9), bands(0.5), bands(1.0)
    ((8, 8), (32, 2), (1, 64))
    """
    sizes = [r for r in range(1, HASHES + 1) if 1 - (1 - similarity**r) ** (HASHES // r) >= CERTAINTY]
    size = max(sizes, default=1)
    return HASHES // size, size


def seeds() -> np.ndarray:
    """(64,) uint32, one for each hash of a signature; always the same, so that a result can be had again."""
    state = np.arange(1, HASHES + 1, dtype=np.uint64) * GOLDEN
    return np.array([mixed(s) >> np.uint64(32) for s in state], np.uint32)


@njit(cache=True, nogil=True)
def shingles(data, offsets, words):
    """Shingles of each text, in the order of the text, repetitions included.

    Args:
        data (bytes,) uint8, offsets (n + 1,) int64: lower-case UTF-8 of n texts.
        words: `text.word_characters()`.

    Returns:
        indptr (n + 1,) int64, hashes (places,) uint64.
    """
    # a word and what ends it take two bytes
    hashes = np.empty((offsets[-1] - offsets[0]) // 2 + offsets.size, np.uint64)
    indptr = np.zeros(offsets.size, np.int64)
    count = 0
    for i in range(offsets.size - 1):
        at, stop = offsets[i], offsets[i + 1]
        before = 0  # words of this text so far
        older, old = np.uint64(0), np.uint64(0)
        while at < stop:
            point, width = code_point(data, at, stop)
            if not words[point]:
                at += width
                continue
            h = FNV_OFFSET
            while at < stop:
                point, width = code_point(data, at, stop)
                if not words[point]:
                    break
                for k in range(at, at + width):
                    h = (h ^ np.uint64(data[k])) * FNV_PRIME
                at += width
            h = mixed(h)
            before += 1
            if before >= WORDS:
                whole = older * GOLDEN + old
                hashes[count] = mixed(whole * GOLDEN + h)
                count += 1
            older, old = old, h
        indptr[i + 1] = count
    return indptr, hashes[:count].copy()


@njit(cache=True, nogil=True)
def signatures(indptr, hashes, seed):
    """MinHash of each text (Broder 1997), (n, 64) uint32, and (n,) uint64 that is equal for equal texts.

    A text without shingles has the largest value everywhere, and 0.
    """
    n = indptr.size - 1
    found = np.full((n, seed.size), np.uint32(0xFFFFFFFF), np.uint32)
    identity = np.zeros(n, np.uint64)
    for i in range(n):
        least = found[i]
        total = np.uint64(0)
        for j in range(indptr[i], indptr[i + 1]):
            total += hashes[j]
            h = np.uint32(hashes[j] >> np.uint64(32))
            for k in range(seed.size):
                # 32 bits, so that the compiler takes eight or sixteen at once
                x = np.uint32(np.uint32(h ^ seed[k]) * np.uint32(0x85EBCA6B))
                x = np.uint32(x ^ np.uint32(x >> np.uint32(13)))
                x = np.uint32(x * np.uint32(0xC2B2AE35))
                least[k] = min(least[k], x)
        identity[i] = total
    return found, identity


@njit(cache=True, nogil=True)
def band_keys(signature, count, size):
    """(n, count) uint64: one key for each band of `size` hashes."""
    keys = np.empty((signature.shape[0], count), np.uint64)
    for i in range(signature.shape[0]):
        for band in range(count):
            h = np.uint64(band + 1)
            for k in range(band * size, (band + 1) * size):
                h = mixed(h * GOLDEN + np.uint64(signature[i, k]))
            keys[i, band] = h
    return keys


@njit(cache=True, nogil=True)
def _distinct(hashes):
    ranked = np.sort(hashes)
    m = 0
    for j in range(ranked.size):
        if j == 0 or ranked[j] != ranked[j - 1]:
            ranked[m] = ranked[j]
            m += 1
    return ranked[:m]


@njit(cache=True, nogil=True)
def sets(indptr, hashes):
    """The distinct shingles of each text, ascending: indptr (n + 1,) int64, hashes uint64."""
    out_indptr = np.zeros_like(indptr)
    out = np.empty_like(hashes)
    for i in range(indptr.size - 1):
        one = _distinct(hashes[indptr[i] : indptr[i + 1]])
        out_indptr[i + 1] = out_indptr[i] + one.size
        out[out_indptr[i] : out_indptr[i + 1]] = one
    return out_indptr, out[: out_indptr[-1]].copy()


@njit(cache=True, nogil=True)
def jaccard(one, other):
    """Shared over all of two ascending sets; 0 where both are empty."""
    i = j = shared = 0
    while i < one.size and j < other.size:
        if one[i] == other[j]:
            shared += 1
            i += 1
            j += 1
        elif one[i] < other[j]:
            i += 1
        else:
            j += 1
    total = one.size + other.size - shared
    return shared / total if total else 0.0


def index(identity, keys, start, size) -> tuple[Known, np.ndarray]:
    """Texts in the order of their rows, with band keys (n, bands), -> Known and the place of each text in it, (n,)."""
    unique, first, place = np.unique(identity, return_index=True, return_inverse=True)
    columns = np.ascontiguousarray(keys[first].T)
    owner = np.argsort(columns, axis=1, kind="stable").astype(np.int64)
    return (
        Known(unique, np.take_along_axis(columns, owner, axis=1), owner, start[first], size[first]),
        place.astype(np.int64),
    )


@njit(cache=True, nogil=True)
def nearest(known, held, indptr, hashes, identity, keys, rows, similarity, best, best_row):
    """Compare texts with those that are known, and note for each of the latter the most similar one.

    Args:
        known: Known; held (places,) uint64: the shingles it points to.
        indptr, hashes, identity, keys, rows (n,) int64: shingles, identities, band keys and rows of the texts.
        similarity: least Jaccard similarity that counts.
        best (m,) float64, best_row (m,) int64: changed in place; 0 and -1 for none; of equal ones the smallest row.

    Of a bucket of more than `TRIED` texts as many are tried, others for another row; a text with the same words is
    always tried.  What is found for a row depends on the row and on all that is known, not on the company of the row.
    """
    seen = np.full(known.identity.size, -1, np.int64)
    for i in range(rows.size):
        if indptr[i] == indptr[i + 1]:
            continue
        own = hashes[:0]  # sorted when there is something to compare with
        for band in range(-1, known.keys.shape[0]):
            if band < 0:
                first = np.searchsorted(known.identity, identity[i])
                after = first + (first < known.identity.size and known.identity[first] == identity[i])
            else:
                first = np.searchsorted(known.keys[band], keys[i, band])
                after = np.searchsorted(known.keys[band], keys[i, band], side="right")
            count = after - first
            shift = np.int64(0)
            if count > TRIED:
                shift = np.int64(mixed(np.uint64(rows[i]) + np.uint64(band + 2)) % np.uint64(count))
            for t in range(min(count, TRIED)):
                at = first + (shift + t) % count
                g = at if band < 0 else known.owner[band, at]
                if seen[g] == i or (best[g] == 1.0 and best_row[g] < rows[i]):
                    continue
                seen[g] = i
                if own.size == 0:
                    own = _distinct(hashes[indptr[i] : indptr[i + 1]])
                if min(own.size, known.size[g]) < similarity * max(own.size, known.size[g]) * (1 - 1e-12):
                    continue
                s = jaccard(own, held[known.start[g] : known.start[g] + known.size[g]])
                if s >= similarity and (s > best[g] or (s == best[g] and rows[i] < best_row[g])):
                    best[g], best_row[g] = s, rows[i]
