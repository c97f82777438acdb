"""Count true and false tags on the test fold."""

from jobs.entry import stage_main

if __name__ == "__main__":
    raise SystemExit(stage_main("evaluate"))
