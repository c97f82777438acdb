"""One sigmoid model a label, with out-of-fold curves."""

from jobs.entry import stage_main

if __name__ == "__main__":
    raise SystemExit(stage_main("train"))
