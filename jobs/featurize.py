"""Turn text into TF-IDF rows."""

from jobs.entry import stage_main

if __name__ == "__main__":
    raise SystemExit(stage_main("featurize"))
