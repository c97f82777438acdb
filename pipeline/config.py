"""Settings: one frozen model per section, default, range and meaning beside each field.

Defaults stand here and nowhere else.  A YAML file in `conf/` holds only what differs, `--set train.C=3` comes last.
Importing this module does nothing else.
"""

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.errors import ConfigError, DataError, InputError, shown

MAX_CONFIG_BYTES = 1_000_000
SECRET = re.compile(r"(secret|password|passphrase|token|(secret|access|account|session)[._-]?key)$|account\.key", re.I)
MAX_SEED = 2**63 - 1

Column = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Frozen, no unknown keys, no silent conversion of text to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value, info):
        # YAML reads no and off as false, which would pass for 0
        kind = cls.model_fields[info.field_name].annotation
        if kind in (int, float, Literal[0, 1]) and isinstance(value, bool | str):
            raise PydanticCustomError("not_a_number", "a number" if kind is not int else "a whole number")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise PydanticCustomError("too_long", "a number of at most 64 bits")
        return value

    @classmethod
    def of_bytes(cls, content: bytes, place: object, what: str) -> Self:
        """From JSON that a stage has kept.  Raises DataError, which names `place`, where it is no `what`."""
        try:
            return cls.model_validate(json.loads(content.decode()))
        except (ValueError, RecursionError) as error:  # a ValidationError is a ValueError
            said = str(error)
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                said = f"{'.'.join(map(str, first['loc']))} {first['msg']}"
            raise DataError(
                f"{place}: {shown(said, 300)}; expected {what} that calibrate writes: run `tagmill calibrate` again, "
                "or fetch the model again"
            ) from error


class InputConfig(Section):
    """Where the columns of the input are."""

    doc_id: Column = Field("doc_id", description="column with the document's identity: string or whole number")
    text: tuple[str, ...] = Field(("text",), min_length=1, description="column, or list of columns joined by newlines")
    labels: Column = Field("labels", description="column with the labels: list of strings, or one string in CSV/TSV")
    split: str | None = Field("split", description="column with train, dev or test; used where it exists")
    label_separator: str = Field("|", min_length=1, description="between the labels of one CSV/TSV cell")
    format: Literal["auto", "parquet", "jsonl", "csv", "tsv"] = Field(
        "auto", description="auto goes by name and content"
    )
    max_document_bytes: PositiveInt = Field(20_000_000, le=1_000_000_000, description="UTF-8 bytes; longer: rejected")
    max_labels_per_document: PositiveInt = Field(1_000, le=1_000_000, description="more: rejected")
    max_label_bytes: PositiveInt = Field(1_000, le=1_000_000, description="UTF-8 bytes of one label; longer: rejected")

    @model_validator(mode="before")
    @classmethod
    def _one_column_is_a_list(cls, data):
        if isinstance(data, dict) and isinstance(data.get("text"), str):
            data = {**data, "text": (data["text"],)}
        return data

    @field_validator("text")
    @classmethod
    def _columns_have_names(cls, text):
        if not all(text):
            raise ValueError("names of columns")
        return text


class IngestConfig(Section):
    """Reading and checking documents."""

    max_rejected: float = Field(
        0.1, ge=0, le=1, description="share of records; above it the run stops with exit code 65"
    )
    max_labels: PositiveInt = Field(
        1_000_000, le=100_000_000, description="distinct labels; above it the run stops with exit code 65"
    )
    min_label_documents: PositiveInt = Field(1, description="labels on fewer documents are left out of the label table")


class SplitConfig(Section):
    """Which documents are for testing."""

    test: float = Field(
        0.2, ge=0, lt=1, description="share of documents, by hash of doc_id; unused where a split is given"
    )
    dev: Literal["train", "drop"] = Field(
        "train", description="documents marked dev join the training folds, or are unused"
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="of the hash that draws test documents and folds")
    near_duplicates: float = Field(
        0.9,
        ge=0,
        le=1,
        description="similarity from which on a test text is told to be that of a training text; 0: none is looked for",
    )


class FeaturizeConfig(Section):
    """Text to TF-IDF."""

    min_df: PositiveInt = Field(2, description="training documents that hold a term; rarer terms are left out")
    max_df: float = Field(1.0, gt=0, le=1, description="share of training documents; more frequent terms are left out")
    max_features: PositiveInt = Field(2_000_000, le=100_000_000, description="most frequent terms kept")
    ngrams: int = Field(1, ge=1, le=3, description="longest run of words that is a term")
    sublinear: bool = Field(True, description="1 + log(count) instead of count")
    vocabulary: str = Field("", description="earlier run whose terms and weights are used; empty: from the documents")


class TrainConfig(Section):
    """One linear model a label."""

    C: tuple[float, ...] = Field(
        (0.5,), description="weight of the loss against the penalty (liblinear); a list: chosen per label"
    )
    loss: Literal["logistic", "squared_hinge"] = Field(
        "squared_hinge", description="of a row's margin; logistic wants a C some forty times as large"
    )
    positive_weight: tuple[float, ...] | Literal["balanced"] = Field(
        (1.0,), description="C of positives over C of negatives; a list: chosen per label; balanced: by base rate"
    )
    label_weights: str = Field(
        "", description="CSV or Parquet with label, positive, negative: factors of C; labels left out have 1"
    )
    choose: Literal["log_loss", "f1"] = Field(
        "log_loss", description="how out-of-fold scores choose among lists: calibrated log loss, or best F1"
    )
    negatives: float = Field(
        0, ge=0, description="negatives a positive (and 1,000) that a label trains on, weighted up; 0: all"
    )
    sample: float = Field(1, gt=0, le=1, description="share of the training documents that models are trained on")
    folds: int = Field(
        3, ge=0, le=15, description="out-of-fold models a label; 0: one model, curves from dev documents"
    )
    dev: float = Field(
        0.1, gt=0, lt=1, description="with folds 0 and no dev documents: share of training documents held out"
    )
    gap: PositiveFloat = Field(0.001, le=1, description="a lane is done when its relative duality gap is below this")
    max_epochs: PositiveInt = Field(
        200, le=1_000_000, description="passes over the rows still moving; then status not_converged"
    )
    prune: float = Field(
        0.001, ge=0, lt=1, description="share by which dropping small weights may raise a label's objective"
    )
    labels_per_block: PositiveInt = Field(32, le=100_000, description="labels of one task, on average")
    warm_start: str = Field("", description="earlier run whose models the solver starts from; same vocabulary")
    max_failed: int = Field(0, ge=0, description="labels that may fail before the run stops with exit code 65")
    suspicious: int = Field(
        3, ge=0, le=1_000, description="documents a label, not labelled and labelled, whose gold its scores doubt most"
    )
    budget: float = Field(
        0, ge=0, description="seconds after which no further labels are begun; those left get a constant; 0: no limit"
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="of the order in which rows are visited, and of samples")

    @field_validator("C", "positive_weight", mode="before")
    @classmethod
    def _one_number_or_distinct_ones(cls, value, info):
        if value == "balanced" and info.field_name == "positive_weight":
            return value
        values = list(value) if isinstance(value, list | tuple) else [value]
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and 1e-4 <= v <= 1e4 for v in values)
        if not values or not numbers or len(set(values)) != len(values):
            word = ", or balanced" if info.field_name == "positive_weight" else ""
            raise ValueError(f"a number from 0.0001 to 10000, a list of distinct ones{word}")
        return tuple(sorted(float(v) for v in values))

    @field_serializer("C", "positive_weight")
    def _one_value_is_shown_as_such(self, values) -> Any:
        return values[0] if len(values) == 1 else values

    @field_validator("folds")
    @classmethod
    def _folds_are_none_or_several(cls, folds):
        if folds == 1:
            raise ValueError("0 (curves from dev documents) or 2 to 15")
        return folds


class CalibrateConfig(Section):
    """Scores to decisions."""

    rule: Literal[
        "f_beta", "precision", "recall", "cost", "youden", "otsu", "pcut", "fixed",
        "global", "budget", "joint",
        "rcut", "samples_f1",
    ] = Field("f_beta", description="objective of the cuts: by label, across labels, by document")  # fmt: skip
    beta: PositiveFloat = Field(
        1.0, le=100, description="of rule f_beta: recall counts beta times as much as precision"
    )
    precision: float = Field(0.8, gt=0, le=1, description="floor of rule precision, under which recall is largest")
    recall: float = Field(0.8, gt=0, le=1, description="floor of rule recall, under which precision is largest")
    cost_fp: PositiveFloat = Field(1.0, description="of rule cost: what a wrong tag costs")
    cost_fn: PositiveFloat = Field(1.0, description="of rule cost: what a missed tag costs")
    at: float = Field(0.5, gt=0, lt=1, description="calibrated probability at which rule fixed tags")
    budget: float = Field(0, ge=0, description="tags a document, on average, of rule budget; 0: as many as gold has")
    guard: Literal["peers", "smoothed", "fbr", "shrink", "none", "nested"] = Field(
        "peers", description="of rare labels, whose own curve is luck; nested: the one that is best across folds"
    )
    peers: float = Field(2.0, ge=0, description="guard peers: pseudo-positives, alike those of labels of like support")
    fbr: float = Field(0.1, ge=0, le=1, description="guard fbr: labels whose best F1 is lower get their highest cut")
    shrink: float = Field(10.0, ge=0, description="guard shrink: support at which own and global cut weigh the same")
    micro: float = Field(0.5, ge=0, description="rule f_beta: weight of a label's part in micro F1 beside its own F")
    k: PositiveInt = Field(5, description="of rule rcut: tags a document, the most probable")
    at_least_one: bool = Field(
        False, description="a document without a tag gets its most probable label, before calibrate.rules"
    )
    min_gap: float = Field(
        0, ge=0, description="of at_least_one: log-odds by which that label must lead the second; 0: no condition"
    )
    at_most: int = Field(
        0, ge=0, description="tags a document at most, the most probable, before calibrate.rules; 0: no limit"
    )
    rules: str = Field("", description="YAML file with rules between labels (implies, excludes, ...); empty: none")
    calibration: Literal["platt", "isotonic", "temperature", "none"] = Field(
        "platt", description="map from scores to probabilities"
    )
    pooling: float = Field(10.0, ge=0, description="pseudo-positives of like labels in each label's map")
    isotonic_positives: PositiveInt = Field(100, description="calibration isotonic: labels with fewer get Platt's map")

    @model_validator(mode="before")
    @classmethod
    def _earlier_names(cls, data):
        # runs of before: rule per_label, and guard as a number
        if isinstance(data, dict) and data.get("rule") == "per_label":
            data = {**data, "rule": "f_beta"}
        if (
            isinstance(data, dict)
            and isinstance(data.get("guard"), int | float)
            and not isinstance(data["guard"], bool)
        ):
            data = {**data, "guard": "peers", "peers": data["guard"]}
        return data


class EvaluateConfig(Section):
    """Conventions that change a number."""

    if_undefined: Literal[0, 1] = Field(0, description="value of 0/0 in precision, recall, F1 and Jaccard")
    propensity_a: float = Field(0.55, ge=0, description="A of the propensity model (Jain et al. 2016)")
    propensity_b: float = Field(1.5, ge=0, description="B of the propensity model (Jain et al. 2016)")
    bootstrap: int = Field(1_000, ge=0, le=100_000, description="resamples of the test documents; 0: no intervals")
    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="of the resamples")
    keep_scores: float = Field(
        2.0, ge=0, description="GB that scores of the test fold may take, so that other thresholds need no scoring"
    )


class TagConfig(Section):
    """What is said of a new document."""

    max_tags: int = Field(0, ge=0, description="at most this many tags a document, the most probable; 0: no limit")


class SparkConfig(Section):
    """Where and how wide the work runs.  Nothing here changes a result."""

    master: str = Field(
        "local[*]", description="as spark-submit's --master; local modes retry a failed task three times"
    )
    partitions: int = Field(0, ge=0, le=100_000, description="parts of the document tables; 0: from size and cores")
    driver_memory: str = Field(
        "2g", pattern=r"^[1-9]\d{0,5}[mg]$", description="heap of the driver's JVM, such as 900m or 2g"
    )
    wait: PositiveInt = Field(300, le=86_400, description="seconds for the first executor of a cluster to start")
    cache_dir: str = Field(
        "", description="host folder of the feature matrix and of copies of objects; empty: the temporary folder"
    )
    document_seconds: PositiveFloat = Field(
        60, le=86_400, description="seconds for each MB of text begun; a document that takes longer alone is rejected"
    )
    document_gb: PositiveFloat = Field(
        4.0,
        le=1_000,
        description="GB of memory beside what a worker holds; a document that takes more alone is rejected",
    )
    options: dict[str, str] = Field(default_factory=dict, description="further Spark settings, spark.* keys")

    @field_validator("master")
    @classmethod
    def _local_threads_are_in_range(cls, master):
        local = r"local(\[(\*|[1-9]\d{0,2})(,[1-9]\d{0,2})?\]|-cluster\[\d+,\d+,\d+\])?"
        if not master or (master.startswith("local") and not re.fullmatch(local, master)):
            raise ValueError("local[N] with N from 1 to 999 or *, or the address of a cluster")
        return master


class MlflowConfig(Section):
    """Where finished runs are reported."""

    enabled: bool = Field(True, description="false: register does nothing")
    tracking_uri: str = Field(
        "", description="empty: MLFLOW_TRACKING_URI, else a SQLite store in the user's data folder"
    )
    experiment: str = Field("tagmill", min_length=1, description="experiment that the run is logged to")
    model: str = Field("tagmill", min_length=1, description="registered model")
    alias: str = Field("champion", description="alias that moves to the new version, last of all; empty: none")
    move_alias: bool = Field(
        False, description="true: the alias moves to this version even where it had it once and was moved since"
    )
    required: bool = Field(False, description="true: an unreachable server is exit code 69")
    timeout: PositiveInt = Field(15, le=86_400, description="seconds before an unreachable server is given up")


class Config(Section):
    """Everything that can be set."""

    input: InputConfig = InputConfig()
    ingest: IngestConfig = IngestConfig()
    split: SplitConfig = SplitConfig()
    featurize: FeaturizeConfig = FeaturizeConfig()
    train: TrainConfig = TrainConfig()
    calibrate: CalibrateConfig = CalibrateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tag: TagConfig = TagConfig()
    spark: SparkConfig = SparkConfig()
    mlflow: MlflowConfig = MlflowConfig()


# sections that say where work runs and is reported: they may change between a run and its resumption
VOLATILE = ("spark", "mlflow", "tag")

# settings that change no result; most of them may stop a run
LIMITS = ("ingest.max_rejected", "ingest.max_labels", "train.max_failed", "train.budget", "evaluate.keep_scores")

Origins = dict[str, str]  # "train.C" -> where its value came from


def load(
    path: str | Path | None = None, sets: tuple[str, ...] | list[str] = (), base: dict | None = None
) -> tuple[Config, Origins]:
    """Defaults, then `base` (a run's own configuration), then the file, then `--set` entries, checked as a whole.

    Raises ConfigError naming the key, its value, what was expected and, for an unknown key, the nearest known one.
    """
    merged: dict[str, Any] = {}
    origins: Origins = {}
    if base:
        _merge(merged, base, "the run", origins)
    if path:
        _merge(merged, _read_yaml(Path(path)), str(path), origins)
    for item in sets:
        _merge(merged, _parse_set(item), f"--set {item}", origins)
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e, origins) for e in error.errors())) from error
    _refuse_secrets(config, base or {})
    return config, origins


def _refuse_secrets(config, base):
    """Settings are kept in run.json, and options reach Spark on a command line; what a run has already may stay."""
    for key in config.spark.options:
        if SECRET.search(key) and key not in (base.get("spark") or {}).get("options", {}):
            raise ConfigError(
                f"spark.options.{shown(key)} is a secret, which every user of the host could read on a command line; "
                "put it into spark-defaults.conf (mode 600) of the folder that SPARK_CONF_DIR names"
            )
    uri = config.mlflow.tracking_uri
    if re.search(r"://[^/\s]*@", uri) and uri != (base.get("mlflow") or {}).get("tracking_uri"):
        raise ConfigError(
            "mlflow.tracking_uri holds a user name or password, which would be kept in run.json; "
            "give the address in MLFLOW_TRACKING_URI, or the password in MLFLOW_TRACKING_PASSWORD"
        )


def flat(config: Config) -> dict[str, Any]:
    """{"train.C": 10.0, ...}: every setting."""
    return {
        f"{name}.{key}": value
        for name, section in config.model_dump(mode="json").items()
        for key, value in section.items()
    }


def differences(before: dict, after: dict) -> list[str]:
    """Settings that differ and may not: "train.C is 1.0, 10.0 in the run".  Volatile sections and limits may."""
    old, new = (flat(Config.model_validate(c)) for c in (before, after))
    return [
        f"{key} is {new[key]!r}, {old[key]!r} in the run"
        for key in new
        if old[key] != new[key] and key.split(".")[0] not in VOLATILE and key not in LIMITS
    ]


def describe() -> dict[str, str]:
    """{"train.C": "weight of the loss ..."}: what every setting means."""
    return {
        f"{name}.{key}": info.description or ""
        for name, field in Config.model_fields.items()
        for key, info in field.annotation.model_fields.items()  # type: ignore[union-attr]
    }


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without aliases; a key given twice is refused; 1e-3 is a number, as in YAML 1.2."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _read_yaml(path):
    if not path.is_file():
        raise InputError(f"{path}: no such configuration file")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size} bytes; a configuration has at most {MAX_CONFIG_BYTES}")
    try:
        value = _parsed(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {shown(error, 300)}") from error
    if value is None:
        return {}
    sections = value.items() if isinstance(value, dict) else [("the whole", value)]
    for section, settings in sections:
        if not isinstance(settings, dict):
            raise ConfigError(
                f"{path}: {shown(section)} is {shown(repr(settings))}; "
                "expected sections with settings, such as train: {C: 10}"
            )
    return value


def _parse_set(item):
    key, equals, text = item.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and section and name):
        raise ConfigError(f"--set {shown(item)}: expected section.name=value, such as train.C=10")
    try:
        value = _parsed(text) if text else ""
    except ValueError as error:
        raise ConfigError(
            f"--set {shown(item)}: the value is not valid YAML; text with special characters stands in double quotes"
        ) from error
    inner = name.split(".", 1)
    return {section: {inner[0]: {inner[1]: value}}} if len(inner) == 2 else {section: {name: value}}


def _parsed(text):
    """The value that YAML text stands for.  Raises ValueError, whatever PyYAML met: an odd scalar, a depth, a tag."""
    try:
        return yaml.load(text, _StrictLoader)
    except Exception as error:  # !!bool maybe is a KeyError, 2024-13-45 a ValueError, ? [a] a TypeError
        raise ValueError(" ".join(str(error).split())) from error


def _merge(merged, extra, source, origins):
    for section, settings in extra.items():
        for key, value in settings.items():
            inside = merged.setdefault(section, {})
            if isinstance(value, dict) and isinstance(inside.get(key), dict):
                value = {**inside[key], **value}
            inside[key] = value
            origins[f"{section}.{key}"] = source


def _explain(error, origins):
    place = ".".join(str(part) for part in error["loc"])
    source = origins.get(".".join(str(part) for part in error["loc"][:2]), "")
    where = f" (from {source})" if source and not source.startswith("--set") else ""
    if error["type"] in ("extra_forbidden", "invalid_key"):
        known = list(Config.model_fields) if len(error["loc"]) == 1 else list(describe())
        near = difflib.get_close_matches(place, known, n=1, cutoff=0.3)
        hint = f"; the nearest known one is {near[0]}" if near else ""
        return f"{shown(place)} is not a setting{where}{hint}; `tagmill show config` lists all"
    expected = re.sub(r"^\w+ should (be |have )?", "", error["msg"].removeprefix("Value error, "))
    if error["type"] == "string_pattern_mismatch":
        expected = "another form"
    return f"{shown(place)} is {shown(repr(error['input']))}; expected {expected}{where}{_meaning(place)}"


def _meaning(place):
    text = describe().get(place)
    return f" ({text})" if text else ""
