"""Choose thresholds, fit probabilities."""

from jobs.entry import stage_main

if __name__ == "__main__":
    raise SystemExit(stage_main("calibrate"))
