import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline import config
from pipeline.config import Config, describe, differences, flat, load
from pipeline.errors import ConfigError, InputError

CONF = Path(config.__file__).parents[1] / "conf"


@pytest.fixture
def file(tmp_path):
    """file(text) -> path of a configuration file that holds it."""

    def write(content):
        path = tmp_path / "settings.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def setting(key, *sets):
    return flat(load(sets=sets)[0])[key]


def refusal(path=None, sets=(), base=None):
    with pytest.raises(ConfigError) as caught:
        load(path, sets, base)
    assert caught.value.code == 78
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


# -- defaults ----------------------------------------------------------------------------------------------------------


def test_defaults_satisfy_their_own_ranges():
    defaults = Config()
    assert Config.model_validate(defaults.model_dump()) == defaults  # a default is not checked unless it is given
    assert Config.model_validate(defaults.model_dump(mode="json")) == defaults
    assert load() == (defaults, {})


def test_every_setting_is_described():
    assert set(describe()) == set(flat(Config()))
    for key, sentence in describe().items():
        assert len(sentence) > 5, key
        assert sentence.isprintable(), key


def test_settings_are_frozen():
    cfg = Config()
    with pytest.raises(ValidationError):
        cfg.train.C = 3.0
    with pytest.raises(ValidationError):
        cfg.train = None
    for name in Config.model_fields:
        assert getattr(cfg, name).model_config["frozen"], name


@pytest.mark.parametrize("name", ["demo.yaml", "cluster.yaml"])
def test_delivered_files_load_and_say_only_what_differs(name):
    cfg, origins = load(CONF / name)
    assert set(origins.values()) == {str(CONF / name)}
    defaults = flat(Config())
    assert all(flat(cfg)[key] != defaults[key] for key in origins)


# -- --set -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("train.C=3", 3.0),
        ("train.C=0.5", 0.5),
        ("train.C=1e-3", 0.001),
        ("train.C=1E2", 100.0),
        ("train.C=1.5e+2", 150.0),
        ("train.C=.5e1", 5.0),
        ("train.seed=7", 7),
        ("featurize.max_features=1e6", 1_000_000),
        ("featurize.sublinear=false", False),
        ("featurize.sublinear=no", False),
        ("mlflow.required=true", True),
        ("input.text=body", ["body"]),
        ("input.text=[title, body]", ["title", "body"]),
        ('input.text=["a=b", "c.d"]', ["a=b", "c.d"]),
        ("input.split=null", None),
        ("input.doc_id=a=b", "a=b"),
        ('input.label_separator=","', ","),
        ("input.label_separator=;", ";"),
        ("mlflow.alias=", ""),
        ('mlflow.alias=""', ""),
        ("mlflow.tracking_uri=http://host:5000", "http://host:5000"),
        ("mlflow.model=v2", "v2"),
        ('mlflow.model="2024"', "2024"),
        ('mlflow.model="1e5"', "1e5"),
        ("spark.master=local[2]", "local[2]"),
        ("spark.options.spark.executor.memory=2g", {"spark.executor.memory": "2g"}),
        ('spark.options.spark.executor.cores="4"', {"spark.executor.cores": "4"}),
    ],
)
def test_set_reads_values(item, expected):
    found = setting(".".join(item.partition("=")[0].split(".")[:2]), item)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("key", [key for key, value in flat(Config()).items() if type(value) is int])
def test_whole_numbers_have_at_most_64_bits(key):
    assert key in refusal(sets=[f"{key}={2**63}"])
    assert key in refusal(sets=[f"{key}=-{10**400}"])


def test_set_entries_of_a_mapping_add_up():
    sets = ("spark.options.spark.a=x", "spark.options.spark.b=y", "spark.options.spark.a=z")
    assert setting("spark.options", *sets) == {"spark.a": "z", "spark.b": "y"}


@pytest.mark.parametrize("item", ["", "train.C", "C=3", "=3", ".=3", "train.=3", ".C=3", "train=3"])
def test_set_wants_section_name_and_value(item):
    assert f"--set {item}: expected section.name=value, such as train.C=10" in refusal(sets=[item])


@pytest.mark.parametrize(
    "value",
    [
        "[",
        "{a: 1",
        "2024-13-45",
        "!!int x",
        "!!bool maybe",
        "!!python/object:os.system x",
        "&a 1",
        "*a",
        "? [a]",
        "\x1b[31m",
        "9" * 5000,
        "[" * 3000,
    ],
    ids=lambda value: ascii(value[:20]),
)
def test_set_refuses_what_is_not_a_value(value):
    message = refusal(sets=[f"input.doc_id={value}"])
    assert "input.doc_id" in message
    assert message.isprintable()


# -- files and precedence ----------------------------------------------------------------------------------------------


def test_set_wins_over_the_file_and_the_file_over_the_run(file):
    path = file("train: {C: 2, gap: 0.2}\nfeaturize: {ngrams: 2}\n")
    base = {"train": {"C": 1.0, "gap": 0.1, "seed": 9}}
    cfg, origins = load(path, ["train.C=3", "tag.max_tags=5"], base)
    assert (cfg.train.C, cfg.train.gap, cfg.train.seed, cfg.featurize.ngrams, cfg.tag.max_tags) == (
        (3.0,),
        0.2,
        9,
        2,
        5,
    )
    assert origins == {
        "train.C": "--set train.C=3",
        "train.gap": str(path),
        "train.seed": "the run",
        "featurize.ngrams": str(path),
        "tag.max_tags": "--set tag.max_tags=5",
    }


def test_the_last_set_wins():
    assert setting("train.C", "train.C=1", "train.C=2") == 2.0


def test_loading_leaves_the_configuration_of_the_run_alone():
    base = {"spark": {"options": {"spark.a": "1"}}}
    load(sets=["spark.options.spark.b=x", "spark.partitions=3"], base=base)
    assert base == {"spark": {"options": {"spark.a": "1"}}}


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n", "{}"])
def test_an_empty_file_changes_nothing(file, text):
    assert load(file(text)) == (Config(), {})


def test_numbers_of_a_file_are_those_of_the_command_line(file):
    cfg, _ = load(file("train: {gap: 1e-3, C: 2E+1}\nfeaturize: {max_features: 1e6}\n"))
    assert (cfg.train.gap, cfg.train.C, cfg.featurize.max_features) == (0.001, (20.0,), 1_000_000)


def test_a_missing_file_is_exit_code_66(tmp_path):
    for path in (tmp_path / "nothing.yaml", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(InputError, match="no such configuration file") as caught:
            load(path)
        assert caught.value.code == 66


HOSTILE = {
    "duplicate key": ("train:\n  C: 1\n  C: 2\n", "'C' is given twice"),
    "duplicate section": ("train: {C: 1}\ntrain: {C: 2}\n", "'train' is given twice"),
    "duplicate key deep inside": ("spark: {options: {a: b, a: c}}", "'a' is given twice"),
    "alias": ("train: &t {C: 1}\ncalibrate: *t\n", "aliases are not allowed"),
    "bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases are not allowed"),
    "merge": ("train: {<<: {C: 3}}", "not valid YAML"),
    "code": ("train: !!python/object/apply:os.system ['touch x']", "not valid YAML"),
    "object": ("train: {C: !!python/object:pathlib.Path {}}", "not valid YAML"),
    "name": ("train: {C: !!python/name:os.system }", "not valid YAML"),
    "own tag": ("train: {C: !secret x}", "not valid YAML"),
    "tag that does not fit": ("!!map text", "not valid YAML"),
    "list as a mapping": ("train: !!map [1]", "not valid YAML"),
    "integer that is none": ("train: {C: !!int abc}", "not valid YAML"),
    "truth that is none": ("train: {C: !!bool maybe}", "not valid YAML"),
    "date that is none": ("train: {C: 2024-13-45}", "not valid YAML"),
    "endless integer": ("train: {C: " + "9" * 5000 + "}", "not valid YAML"),
    "list as a key": ("? [a]\n: b", "not valid YAML"),
    "deep list": ("[" * 5000, "not valid YAML"),
    "deep mapping": ("{a: " * 3000, "not valid YAML"),
    "two documents": ("train: {C: 1}\n---\ntrain: {C: 2}\n", "not valid YAML"),
    "control character": ("train: {C: '\x1b'}", "not valid YAML"),
    "not UTF-8": (b"train: {C: \xff}", "not valid YAML"),
    "UTF-16": ("train: {C: 1}".encode("utf-16"), "not valid YAML"),
    "binary": (bytes(range(256)), "not valid YAML"),
    "tab": ("train:\n\tC: 1\n", "not valid YAML"),
    "list": ("- train\n", "expected sections with settings"),
    "number": ("3", "expected sections with settings"),
    "text": ("train", "expected sections with settings"),
    "section without settings": ("train:\n", "train is None; expected sections"),
    "section that is a number": ("split: {test: 0.3}\ntrain: 3\n", "train is 3; expected sections"),
    "set": ("train: !!set {C}", "expected sections with settings"),
    "number as a section": ("1: {a: b}", "1 is not a setting"),
    "number as a key": ("train: {1: 2}", "train.1 is not a setting"),
    "null as a key": ("train: {~: 2}", "train.None is not a setting"),
    "escape in a key": ('train: {"a\\e[31m": 2}', r"train.a\x1b[31m is not a setting"),
    "escape in an option": ('spark: {options: {"a\\e": 2}}', r"spark.options.a\x1b is 2"),
    "2 MB": ("#" * 2_000_000, "2000000 bytes; a configuration has at most 1000000"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_one_line(file, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, expected = HOSTILE[case]
    path = file(content)
    message = refusal(path)
    assert expected in message
    assert message.isprintable()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing was run


def test_a_file_error_says_which_file_and_where(file):
    path = file("train:\n  C: 1\n  C: 2\n")
    assert f"{path}: " in refusal(path)
    assert "line 3" in refusal(path)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "near"),
    [
        ("train.c=1", "train.C"),
        ("train.fold=3", "train.folds"),
        ("train.max_epoch=3", "train.max_epochs"),
        ("featurise.min_df=3", "featurize"),
        ("tain.C=3", "train"),
        ("calibrate.rulez=fixed", "calibrate.rule"),
        ("input.txt=body", "input.text"),
        ("spark.partition=3", "spark.partitions"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(item, near):
    message = refusal(sets=[item])
    assert "is not a setting" in message
    assert f"the nearest known one is {near};" in message
    assert "tagmill show config" in message


def test_an_unknown_name_far_from_all_others_gets_no_suggestion():
    assert "nearest" not in refusal(sets=["zzzzzzzz.qqqqqq=1"])


def test_all_errors_come_at_once(file):
    message = refusal(file("train: {C: -1, folds: 1}\nsplt: {test: 2}\n"), ["featurize.ngrams=9"])
    for part in ("train.C is -1", "train.folds is 1", "splt is not a setting", "featurize.ngrams is 9"):
        assert part in message


# -- ranges ------------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.C", -1.0),
        ("train.C", 0),
        ("train.C", NAN),
        ("train.C", INF),
        ("train.C", -INF),
        ("train.C", 1e300),
        ("train.C", "3"),
        ("train.C", True),
        ("train.C", None),
        ("train.C", []),
        ("train.C", [1, 1.0]),
        ("train.C", [1, "2"]),
        ("train.C", [1, 1e5]),
        ("train.C", [True]),
        ("train.C", "balanced"),
        ("train.positive_weight", "equal"),
        ("train.positive_weight", ["balanced"]),
        ("train.positive_weight", 0),
        ("train.loss", "hinge"),
        ("train.sample", 0),
        ("train.sample", 1.1),
        ("train.negatives", -1),
        ("train.budget", -1),
        ("train.C", {"x": 1}),
        ("train.folds", 1),
        ("train.folds", -1),
        ("train.folds", 16),
        ("train.folds", 2.5),
        ("train.folds", False),  # YAML's no, off and n
        ("train.dev", 0),
        ("train.dev", 1),
        ("train.gap", 0),
        ("train.gap", 2),
        ("train.max_epochs", 0),
        ("train.max_epochs", 10**12),
        ("train.prune", 1),
        ("train.prune", NAN),
        ("train.labels_per_block", 0),
        ("train.labels_per_block", 10**9),
        ("train.max_failed", -1),
        ("train.seed", -1),
        ("train.seed", 2**64),
        ("split.seed", 2**64),
        ("split.test", 1),
        ("split.test", -0.1),
        ("split.dev", "test"),
        ("featurize.min_df", 0),
        ("featurize.max_df", 0),
        ("featurize.max_df", 1.1),
        ("featurize.max_features", 10**12),
        ("featurize.max_features", 0),
        ("featurize.ngrams", 4),
        ("featurize.sublinear", 2),
        ("calibrate.rule", "best"),
        ("calibrate.peers", -1),
        ("calibrate.micro", INF),
        ("calibrate.pooling", NAN),
        ("evaluate.if_undefined", 0.5),
        ("evaluate.if_undefined", True),
        ("evaluate.propensity_a", -1),
        ("evaluate.propensity_b", -2),
        ("tag.max_tags", -1),
        ("ingest.max_rejected", 1.5),
        ("ingest.max_rejected", NAN),
        ("ingest.max_labels", 10**12),
        ("ingest.min_label_documents", 0),
        ("input.doc_id", ""),
        ("input.labels", ""),
        ("input.text", []),
        ("input.text", ""),
        ("input.text", ["body", ""]),
        ("input.text", [1]),
        ("input.label_separator", ""),
        ("input.format", "xml"),
        ("input.max_document_bytes", 0),
        ("input.max_document_bytes", 10**12),
        ("input.max_labels_per_document", 10**12),
        ("input.max_label_bytes", 10**12),
        ("spark.master", ""),
        ("spark.master", "local[0]"),
        ("spark.master", "local[-1]"),
        ("spark.master", "local[1000000]"),
        ("spark.master", "local[2"),
        ("spark.master", "local[two]"),
        ("spark.partitions", -1),
        ("spark.partitions", 1e9),
        ("spark.driver_memory", "0g"),
        ("spark.driver_memory", "2 GB"),
        ("spark.driver_memory", "99999999g"),
        ("spark.options", {"spark.a": 1}),
        ("mlflow.timeout", 0),
        ("mlflow.timeout", 10**9),
        ("mlflow.experiment", ""),
        ("mlflow.model", ""),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(key, value):
    section, name = key.split(".")
    message = refusal(base={section: {name: value}})
    assert message.startswith(key)
    assert "; expected " in message
    assert "(from the run)" in message


def test_limits_of_the_ranges_are_allowed():
    for item in ("train.folds=0", "train.folds=2", "train.folds=15", "split.test=0", "ingest.max_rejected=1"):
        load(sets=[item])
    for master in ("local", "local[*]", "local[1]", "local[999]", "local[2,4]", "local-cluster[2,1,1024]", "yarn"):
        assert setting("spark.master", f'spark.master="{master}"') == master


def test_a_message_says_where_what_expected_and_why(file):
    assert refusal(sets=["train.C=-1"]) == (
        "train.C is -1; expected a number from 0.0001 to 10000, a list of distinct ones "
        "(weight of the loss against the penalty (liblinear); a list: chosen per label)"
    )
    path = file("train: {C: many}\n")
    assert refusal(path) == (
        f"train.C is 'many'; expected a number from 0.0001 to 10000, a list of distinct ones (from {path}) "
        "(weight of the loss against the penalty (liblinear); a list: chosen per label)"
    )
    assert "train.folds is 1; expected 0 (curves from dev documents) or 2 to 15" in refusal(sets=["train.folds=1"])


def test_a_long_or_hostile_value_is_cut_and_escaped():
    message = refusal(base={"train": {"C": "\x1b[31m\n" + "x" * 10_000}})
    assert r"\x1b[31m" in message
    assert message.isprintable()


# -- resumption --------------------------------------------------------------------------------------------------------


def dumped(*sets):
    return load(sets=sets)[0].model_dump(mode="json")


def test_differences_name_the_settings_with_both_values():
    assert differences(dumped("train.C=10"), dumped("train.C=1")) == ["train.C is 1.0, 10.0 in the run"]
    found = differences(dumped(), dumped("split.seed=4", "input.text=[a, b]"))
    assert found == ["input.text is ['a', 'b'], ['text'] in the run", "split.seed is 4, 0 in the run"]
    assert differences(dumped("train.C=1"), dumped("train.C=1e0")) == []


def test_differences_ignore_sections_that_change_no_result():
    other = dumped("spark.partitions=9", "spark.options.spark.a=b", "mlflow.enabled=false", "tag.max_tags=3")
    assert differences(dumped(), other) == []
    assert set(config.VOLATILE) <= set(Config.model_fields)


def test_a_run_of_an_earlier_version_lacks_newer_settings():
    before = dumped()
    del before["train"]["prune"]
    assert differences(before, dumped()) == []


def test_import_does_nothing_else(tmp_path):
    program = "import sys, pipeline.config; print('pyspark' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(CONF.parent)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("False False\n", "")
    assert list(tmp_path.iterdir()) == []


def test_one_number_or_several():
    cfg = load(sets=["train.C=[30, 1,10]", "train.positive_weight=balanced"])[0]
    assert (cfg.train.C, cfg.train.positive_weight) == ((1.0, 10.0, 30.0), "balanced")
    again = Config.model_validate(cfg.model_dump(mode="json"))
    assert again == cfg
    assert flat(Config())["train.C"] == 0.5  # a single value is shown as such
    assert flat(cfg)["train.C"] == [1.0, 10.0, 30.0]


@pytest.mark.parametrize(
    "setting",
    [
        "spark.options.spark.authenticate.secret=canary",
        "spark.options.spark.hadoop.fs.s3a.secret.key=canary",
        "spark.options.spark.hadoop.fs.s3a.access.key=canary",
        "spark.options.spark.ssl.keyPassword=canary",
        "spark.options.spark.kubernetes.authenticate.submission.oauthToken=canary",
        "mlflow.tracking_uri=https://me:canary@host/",
    ],
)
def test_secrets_are_refused_and_not_repeated(setting, tmp_path):
    key, value = setting.split("=", 1)
    with pytest.raises(ConfigError) as caught:
        config.load(sets=[setting])
    assert key in str(caught.value)
    assert "canary" not in str(caught.value)
    section, name = key.split(".")[:2]
    nested = {section: {name: value if name == "tracking_uri" else {key.split(".", 2)[2]: value}}}
    path = tmp_path / "settings.yaml"
    path.write_text(json.dumps(nested))  # JSON is YAML
    with pytest.raises(ConfigError):
        config.load(path)
    config.load(base=nested)  # a run of before is read


@pytest.mark.parametrize(
    "key",
    [
        "spark.hadoop.fs.s3a.aws.credentials.provider",
        "spark.authenticate.secret.file",
        "spark.authenticate.secretBitLength",
        "spark.security.credentials.hadoopfs.enabled",
    ],
)
def test_settings_about_secrets_are_none(key):
    assert key in config.load(sets=[f"spark.options.{key}=x"])[0].spark.options
