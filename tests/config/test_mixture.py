"""How a mixture is written, and what is none."""

import json
from dataclasses import asdict, replace

import pytest

from maxsep.config import Config, ConfigError, cli, from_config_dict
from maxsep.config.mixture import Share, parse, ratio
from maxsep.config.schema import DataConfig
from maxsep.config.validate import validate
from maxsep.output import workdir

WEB_AND_CODE = (Share("web", 0.7, "files", "a/*.parquet"), Share("code", 0.3, "tokens", "b:c"))
WRITTEN = "web:0.7:a/*.parquet,code:0.3:tokens:b:c"


@pytest.mark.parametrize(
    "value",
    [
        WRITTEN,
        [("web", 0.7, "files", "a/*.parquet"), ["code", 0.3, "tokens", "b:c"]],
        WEB_AND_CODE,
        json.loads(json.dumps(asdict(Config(data=DataConfig(mixture=WEB_AND_CODE)))))["data"]["mixture"],
    ],
    ids=["command line", "config file", "itself", "config.json"],
)
def test_ways_to_write_one(value):
    found = from_config_dict({"data": {"mixture": value}}).data.mixture
    assert found == WEB_AND_CODE and [share.path for share in found] == ["a/*.parquet", "b:c"]


def test_the_default_corpus_may_be_a_part():
    assert parse("docs:1:docstrings") == (Share("docs", 1.0, "docstrings", None),)


@pytest.mark.parametrize(
    "value, message",
    [
        ("", "got ''; takes NAME:WEIGHT:PATH"),
        ("web", "got 'web'; takes NAME:WEIGHT:PATH"),
        ("web:1", "got 'web:1'; takes NAME:WEIGHT:PATH"),
        (7, "got 7; takes NAME:WEIGHT:PATH"),
        ([], "got \\[\\]; takes NAME:WEIGHT:PATH"),
        ([("web", 1.0, "DIR")], "got 'web:1.0:DIR'; takes NAME:WEIGHT:PATH"),
        ([3], "got '3'; takes NAME:WEIGHT:PATH"),
        (":1:DIR", "'' is no name"),
        ("a b:1:DIR", "'a b' is no name"),
        ("web:x:DIR", "web has the weight 'x'; takes a number above 0, up to 1"),
        ("web:0:DIR", "web has the weight 0; takes a number above 0, up to 1"),
        ("web:-1:DIR", "web has the weight -1; takes a number above 0, up to 1"),
        ("web:nan:DIR", "web has the weight nan; takes a number above 0, up to 1"),
        ("web:70:A,code:30:B", "web has the weight 70; takes a number above 0, up to 1"),
        ("web:0.7:A,code:0.2:B", "the weights add up to 0.9; takes shares of the tokens, which add up to 1"),
        ("web:0.5:A,web:0.5:B", "web is there twice; takes each name once"),
        ("web:1:", "web has the path ''; takes one, as its source is files"),
        ("web:1:docstrings:A", "web has the path 'A'; takes none, as its source is docstrings"),
        ([("web", 1.0, "hub", "A")], "web has the source 'hub'; takes docstrings, tfds, files, tokens"),
    ],
)
def test_what_is_no_mixture_is_one_line(value, message):
    with pytest.raises(ConfigError, match=f"^data\\.mixture: {message}"):
        from_config_dict({"data": {"mixture": value}})


def test_the_ratio_is_that_of_the_digits():
    assert ratio(parse("a:0.7:x,b:0.3:y")) == [7, 3]
    assert ratio(parse("a:0.333:x,b:0.333:y,c:0.333:z")) == [333] * 3
    assert ratio(parse("a:1e-9:x,b:0.999999999:y")) == [1, 999999999]


@pytest.mark.parametrize("field, value", [("source", "files"), ("path", "DIR"), ("name", "en")])
def test_a_mixture_names_the_sources_alone(field, value):
    with pytest.raises(
        ConfigError, match=rf"^data\.{field}: got '{value}'; takes .*, as data\.mixture names the sources"
    ):
        validate(Config(data=DataConfig(mixture=WEB_AND_CODE, **{field: value})))


def test_a_resumed_run_keeps_names_and_weights_and_may_find_the_text_elsewhere(tmp_path):
    def run(mixture):
        return Config(data=DataConfig(mixture=parse(mixture)))

    workdir.write_config(tmp_path, workdir.resolve(run(WRITTEN)), "corpus", "tokenizer")
    moved = workdir.check_resume(tmp_path, run(WRITTEN.replace("a/*", "moved/*")), "corpus")
    assert moved.data.mixture[0].path == "moved/*.parquet"
    for other in ("web:0.6:a/*.parquet,code:0.4:tokens:b:c", "web:0.7:a/*.parquet,kode:0.3:tokens:b:c", "web:1:a"):
        with pytest.raises(ConfigError, match=r"^data\.mixture: got \(web:.*\); the run in .* has \(web:0\.7:files:a/"):
            workdir.check_resume(tmp_path, run(other), "corpus")


def test_the_flag_is_read_like_the_others(tmp_path):
    file = tmp_path / "mixed.py"
    file.write_text(
        "from configs import base\n\ndef get_config():\n    config = base.get_config()\n"
        f"    config.data.mixture = {[('web', 1.0, 'files', 'a')]}\n    return config\n"
    )
    argv = ["train.py", f"--config={file}"]
    assert cli.parse(argv, lambda values: None, "configs/base.py").config.data.mixture == parse("web:1:a")
    flag = f"--config.data.mixture={WRITTEN}"
    assert cli.parse([*argv, flag], lambda values: None, "configs/base.py").config.data.mixture == WEB_AND_CODE
    none = cli.parse([*argv, "--config.data.mixture=None"], lambda values: None, "configs/base.py").config
    assert none == replace(none, data=replace(none.data, mixture=None))
