"""Arithmetic: numpy, scipy and numba only.  No files, no logging, no Spark.

Letters used throughout:

    n documents   d features   L labels   k cut-off
    X (n, d) features, CSR        Y (n, L) gold, 0 or 1       W (d, L) weights
    S (n, L) scores (log-odds)    P (n, L) probabilities      t (L,) thresholds

A *label* is what we learn, a *tag* is what we say.  A *lane* is one binary problem, a *curve* is a label's
(cut, tp, fp) triples.
"""
