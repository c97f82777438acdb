"""Text to hashed term counts: from the UTF-8 bytes of an Arrow buffer, without a Python object a token.

A token is a maximal run of word characters (letters, digits, underscore) of at least two code points, as scikit-learn's
default pattern has it.  A term is a run of 1 to `ngrams` tokens of one document; its 64-bit hash stands for it.
"""

import functools

import numpy as np
from numba import njit

FNV_OFFSET, FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)  # FNV-1a
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # odd, bits without a pattern: 2^64 over the golden ratio


@functools.cache
def word_characters() -> np.ndarray:
    """(0x110000,) uint8: 1 where the code point is a letter, a digit or the underscore."""
    return np.frombuffer(bytes(chr(c).isalnum() or c == 0x5F for c in range(0x110000)), dtype=np.uint8)


@njit(cache=True, nogil=True)
def code_point(data, at, stop):
    """The code point that starts at `at` and its length in bytes; valid UTF-8 is assumed."""
    b = np.int64(data[at])
    if b < 0x80:
        return b, 1
    if b < 0xE0 and at + 1 < stop:
        return ((b & 0x1F) << 6) | (data[at + 1] & 0x3F), 2
    if b < 0xF0 and at + 2 < stop:
        return ((b & 0x0F) << 12) | ((data[at + 1] & 0x3F) << 6) | (data[at + 2] & 0x3F), 3
    if at + 3 < stop:
        return ((b & 0x07) << 18) | ((data[at + 1] & 0x3F) << 12) | ((data[at + 2] & 0x3F) << 6) | (
            data[at + 3] & 0x3F
        ), 4
    return np.int64(0), 1


@njit(cache=True, nogil=True)
def mixed(h):
    """Spread the bits of a hash (the finaliser of MurmurHash3)."""
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xFF51AFD7ED558CCD)
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ (h >> np.uint64(33))


@njit(cache=True, nogil=True)
def tokenize(data, offsets, words, ngrams):
    """Terms of each document.

    Args:
        data (bytes,) uint8, offsets (n + 1,) int64: lower-case UTF-8 text of n documents.
        words: `word_characters()`.
        ngrams: longest run of tokens that is a term, 1 to 3.

    Returns:
        indptr (n + 1,) int64; hashes (terms,) uint64; starts (terms,) int64 and lengths (terms,) int32: the bytes from
        the first to the last character of the term in `data`, whatever stands between its tokens included.
    """
    size = (offsets[-1] - offsets[0]) // 3 + offsets.size + 4
    hashes = np.empty(size * ngrams, np.uint64)
    starts = np.empty(size * ngrams, np.int64)
    lengths = np.empty(size * ngrams, np.int32)
    indptr = np.zeros(offsets.size, np.int64)
    count = 0
    last_hash = np.zeros(3, np.uint64)
    last_start = np.zeros(3, np.int64)
    for i in range(offsets.size - 1):
        at, stop = offsets[i], offsets[i + 1]
        before = 0  # tokens of this document so far
        while at < stop:
            point, width = code_point(data, at, stop)
            if not words[point]:
                at += width
                continue
            start, points, h = at, 0, FNV_OFFSET
            while at < stop:
                point, width = code_point(data, at, stop)
                if not words[point]:
                    break
                for k in range(at, at + width):
                    h = (h ^ np.uint64(data[k])) * FNV_PRIME
                at += width
                points += 1
            if points < 2:
                continue
            h = mixed(h)
            last_hash[before % 3], last_start[before % 3] = h, start
            before += 1
            hashes[count], starts[count], lengths[count] = h, start, at - start
            count += 1
            for run in range(2, min(ngrams, before) + 1):
                # from the oldest token of the run to this one, so that the order of the tokens matters
                whole = np.uint64(run)
                for back in range(run - 1, -1, -1):
                    whole = mixed(whole * GOLDEN + last_hash[(before - 1 - back) % 3])
                first = last_start[(before - run) % 3]
                hashes[count], starts[count], lengths[count] = whole, first, at - first
                count += 1
        indptr[i + 1] = count
    return indptr, hashes[:count].copy(), starts[:count].copy(), lengths[:count].copy()


@njit(cache=True, nogil=True)
def count_terms(indptr, hashes):
    """Distinct terms of each document and how often they occur.

    Returns (n + 1,) int64 indptr, hashes uint64 ascending within a document, counts int32, and for each the position of
    one occurrence in the input.
    """
    out_indptr = np.zeros_like(indptr)
    out = np.empty(hashes.size, np.uint64)
    counts = np.empty(hashes.size, np.int32)
    where = np.empty(hashes.size, np.int64)
    m = 0
    for i in range(indptr.size - 1):
        start, stop = indptr[i], indptr[i + 1]
        order = np.argsort(hashes[start:stop])
        for j in range(order.size):
            k = start + order[j]
            if j and hashes[k] == out[m - 1]:
                counts[m - 1] += 1
            else:
                out[m], counts[m], where[m] = hashes[k], 1, k
                m += 1
        out_indptr[i + 1] = m
    return out_indptr, out[:m].copy(), counts[:m].copy(), where[:m].copy()


@njit(cache=True, nogil=True, error_model="numpy")
def tfidf(indptr, ids, counts, idf, sublinear):
    """TF-IDF rows of unit length over the known terms.

    Args:
        indptr (n + 1,), ids (terms,) int32 feature or -1 for an unknown term, counts (terms,) int32.
        idf (d,) float64.
        sublinear: 1 + log(count) instead of count.

    Returns:
        indptr (n + 1,) int64, indices int32 ascending within a row, values float32.  A document without a known term
        has an empty row.
    """
    out_indptr = np.zeros_like(indptr)
    indices = np.empty(ids.size, np.int32)
    values = np.empty(ids.size, np.float32)
    m = 0
    for i in range(indptr.size - 1):
        start, stop = indptr[i], indptr[i + 1]
        order = np.argsort(ids[start:stop])
        first, total = m, 0.0
        weights = np.empty(stop - start)
        for j in order:
            feature = ids[start + j]
            if feature < 0:
                continue
            tf = np.float64(counts[start + j])
            weight = (1.0 + np.log(tf) if sublinear else tf) * idf[feature]
            weights[m - first], indices[m] = weight, feature
            total += weight * weight
            m += 1
        norm = np.sqrt(total)
        for k in range(first, m):
            values[k] = weights[k - first] / norm
        out_indptr[i + 1] = m
    return out_indptr, indices[:m].copy(), values[:m].copy()


def smooth_idf(df: np.ndarray, n: int) -> np.ndarray:
    """log((1 + n) / (1 + df)) + 1, float64: scikit-learn's smoothed inverse document frequency."""
    return np.log((1.0 + n) / (1.0 + df.astype(np.float64))) + 1.0
