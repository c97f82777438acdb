"""The command `tagmill`: fit, tag, calibrate, show, status, compare, register, demo."""

import csv
import importlib.metadata
import json
import sys
from typing import Annotated

import typer

from jobs import entry
from pipeline import config as configuration
from pipeline import versions
from pipeline.code import code_version
from pipeline.store import Run

app = typer.Typer(
    help="Tagmill tags documents with many labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Sets = Annotated[list[str], typer.Option("--set", metavar="a.b=c", help="One setting; may be repeated.")]
ConfigFile = Annotated[
    str | None, typer.Option("--config", metavar="FILE", help="YAML with what differs from the defaults.")
]
Master = Annotated[str | None, typer.Option(metavar="URL", help="Spark master; default local[*].")]
_PATH = typer.Option(metavar="PATH", help="Parquet, JSON Lines, CSV, TSV: file, folder, glob, URI; or table:NAME.")
Input = Annotated[str, _PATH]
RunDir = Annotated[str, typer.Option(metavar="DIR", help="Run folder, or its URI in an object store.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Redo what was made with other settings or input.")]
Debug = Annotated[bool, typer.Option("--debug", help="Traceback on failure.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"tagmill {importlib.metadata.version('tagmill')}, code {code_version()}")
        raise typer.Exit()


@app.callback()
def _any_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="The version, and a mark of the code.")
    ] = False,
) -> None:
    """Tagmill tags documents with many labels."""


def _names(item: str) -> list[str]:
    """Names separated by commas; one that holds a comma stands in double quotes, as in CSV."""
    try:
        return [name for name in next(csv.reader([item], skipinitialspace=True, strict=True), []) if name]
    except csv.Error as error:
        raise configuration.ConfigError(
            f"--labels {item[:100]!r}: {error}; expected names separated by commas, each on one line, "
            "in double quotes where it holds a comma"
        ) from error


def _guarded(function, debug: bool) -> None:
    entry.logging_to_stderr(debug)
    raise typer.Exit(entry.guarded(function, debug))


@app.command()
def fit(
    run: RunDir,
    input: Annotated[str | None, _PATH] = None,
    labels: Annotated[
        list[str],
        typer.Option(metavar="NAME,...", help="Train or refit these labels only; the others stay. May be repeated."),
    ] = [],  # noqa: B006
    config: ConfigFile = None,
    set: Sets = [],  # noqa: B006  (typer reads it)
    master: Master = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Fit a tagger: ingest, split, featurize, train, calibrate, evaluate, register.  The same command resumes."""
    if input is None and not (labels and Run(run).exists):
        raise typer.BadParameter("give --input PATH (it may be left out with --labels and a run that is there)")

    def command():
        chosen = tuple(dict.fromkeys(name for item in labels for name in _names(item)))
        if labels and not chosen:
            raise configuration.ConfigError("--labels names no label; expected NAME,...")
        base = Run(run).info["config"] if chosen and Run(run).exists else None
        cfg, _ = configuration.load(config, [*set, *entry.master_setting(master)], base)
        only = None if input else ("train", "calibrate", "evaluate", "register")
        show_metrics(entry.fit(run, input, cfg, overwrite, only=only, labels=chosen))

    _guarded(command, debug)


@app.command()
def tag(
    input: Input,
    output: Annotated[str, typer.Option(metavar="PATH", help="Folder of Parquet that is made.")],
    run: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of a finished fit.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="URI", help="Registered model, as models:/tagmill@champion.")
    ] = None,
    config: ConfigFile = None,
    set: Sets = [],  # noqa: B006
    master: Master = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Tag documents with a fitted run or a registered model."""
    if (run is None) == (model is None):
        raise typer.BadParameter("give either --run DIR or --model URI")

    def command():
        from jobs import tag as tagging

        cfg = tagging.tag_config(run, config, [*set, *entry.master_setting(master)])
        tagging.tag(run, model, input, output, cfg, overwrite)
        print(output)

    _guarded(command, debug)


@app.command()
def calibrate(
    run: RunDir,
    version: Annotated[
        int | None, typer.Option(metavar="N", help="Put an earlier version back (`tagmill show RUN --versions`).")
    ] = None,
    set: Sets = [],  # noqa: B006
    master: Master = None,
    debug: Debug = False,
) -> None:
    """New thresholds from the stored curves, or earlier ones, evaluated again; nothing is trained."""

    def command():
        base = Run(run).info["config"]
        if version is not None:
            base = {**base, **versions.settings(versions.version(Run(run), version))}
            if any(item.startswith(("calibrate.", "evaluate.")) for item in set):
                raise configuration.ConfigError(
                    "--version has its own settings of calibrate.* and evaluate.*; leave out --version or --set"
                )
        cfg, _ = configuration.load(None, [*set, *entry.master_setting(master)], base)
        other = [
            d
            for d in configuration.differences(base, cfg.model_dump(mode="json"))
            if d.split(".")[0] not in ("calibrate", "evaluate")
        ]
        if other:
            raise configuration.ConfigError(
                f"--set {other[0]}: `tagmill calibrate` changes calibrate.* and evaluate.* only"
            )
        stages = ("calibrate", "evaluate", "register")
        show_metrics(entry.fit(run, None, cfg, overwrite=True, only=stages, version=version))

    _guarded(command, debug)


@app.command()
def register(run: Annotated[str, typer.Argument(metavar="RUN")], set: Sets = [], debug: Debug = False) -> None:  # noqa: B006
    """Send a finished run to MLflow, when the server was not there at the time of the fit."""

    def command():
        cfg, _ = configuration.load(
            None, ["mlflow.required=true", "mlflow.enabled=true", *set], Run(run).info["config"]
        )
        entry.fit(run, None, cfg, only=("register",))

    _guarded(command, debug)


@app.command()
def show(
    run: Annotated[str, typer.Argument(metavar="RUN|config", help="Run folder, or `config` for every setting.")],
    label: Annotated[
        str | None, typer.Option(metavar="NAME", help="One label: counts, threshold, curve, weights.")
    ] = None,
    table: Annotated[str | None, typer.Option(metavar="NAME", help="One table of the run.")] = None,
    output: Annotated[str | None, typer.Option(metavar="FILE", help="Write the table to .parquet or .csv.")] = None,
    thresholds: Annotated[
        bool, typer.Option("--thresholds", help="What each rule for thresholds would give, side by side.")
    ] = False,
    versions: Annotated[bool, typer.Option("--versions", help="Earlier thresholds, which can be put back.")] = False,
    config: ConfigFile = None,
    set: Sets = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    debug: Debug = False,
) -> None:
    """Show a run: metrics, labels, stages; one label; one table; or every setting and where it came from."""

    def command():
        from jobs import show as showing

        if run == "config":
            showing.settings(*configuration.load(config, set), as_json)
        elif thresholds:
            cfg, _ = configuration.load(config, set, Run(run).info["config"])
            showing.thresholds(Run(run), cfg, as_json)
        elif versions:
            showing.versions(Run(run), as_json)
        elif table:
            showing.table(Run(run), table, output, as_json)
        elif label is not None:
            showing.label(Run(run), label, as_json)
        else:
            showing.overview(Run(run), as_json)

    _guarded(command, debug)


@app.command()
def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    debug: Debug = False,
) -> None:
    """Tell what of a run is done, running, failed, left.

    Exit code 0: complete; 75: a command works on it; 1: unfinished; else that of the command that failed.
    """
    codes = []

    def command():
        from jobs import status as telling

        codes.append(telling.status(Run(run), as_json))

    entry.logging_to_stderr(debug)
    code = entry.guarded(command, debug)
    raise typer.Exit(code or (codes[0] if codes else 0))


@app.command()
def compare(
    run_a: Annotated[str, typer.Argument(metavar="A", help="Run folder.")],
    run_b: Annotated[str, typer.Argument(metavar="B", help="Run folder with the same test documents.")],
    replicates: Annotated[
        int, typer.Option(min=100, max=10_000, help="How often the test documents are resampled.")
    ] = 1000,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="How often an interval holds the truth.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the resampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts; all labels.")] = False,
    debug: Debug = False,
) -> None:
    """Compare two runs on the same test documents: metrics and labels, B less A, with intervals."""

    def command():
        from jobs import compare as comparing

        comparing.compare(Run(run_a), Run(run_b), as_json, replicates, confidence, seed)

    _guarded(command, debug)


@app.command()
def demo(
    run: RunDir = "tagmill-demo",
    set: Sets = [],  # noqa: B006
    master: Master = None,
    debug: Debug = False,
) -> None:
    """Fit on the docstrings of the installed libraries and tag five of them."""

    def command():
        from jobs import demo as demonstration

        demonstration.demo(run, [*set, *entry.master_setting(master)])

    _guarded(command, debug)


def show_metrics(run: Run) -> None:
    from jobs import show as showing

    showing.metrics_table(json.loads(run.files("metrics.json")[0].read_text()))
    print(f"\nreport   {run.root / 'report.html'}")


def main() -> None:
    """Entry point of the command."""
    sys.exit(app())


if __name__ == "__main__":
    main()
