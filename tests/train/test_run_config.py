import pytest
import yaml

from mgt_fast.config import MGTConfig
from mgt_fast.train.config import (
    CONFIG_DIR,
    ConfigError,
    FinetuneConfig,
    PretrainConfig,
    dump_config,
    load_config,
)


@pytest.mark.parametrize(("name", "kind"), [("pretrain", PretrainConfig), ("finetune", FinetuneConfig)])
def test_published_file_holds_the_defaults(name, kind):
    assert load_config(kind, name) == kind()


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_files_are_valid(path):
    load_config(PretrainConfig if "pretrain" in path.stem else FinetuneConfig, path.stem)


def test_override_wins_over_file_and_file_over_base(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optim: {lr: 1e-3, epochs: 13}\n")
    config = load_config(
        FinetuneConfig, file, ["optim.epochs=12", "optim.epochs=11"], {"optim": {"lr": 1.0, "batch_size": 3}}
    )
    assert (config.optim.lr, config.optim.epochs, config.optim.batch_size) == (1e-3, 11, 3)
    assert config.optim.weight_decay == FinetuneConfig().optim.weight_decay


@pytest.mark.parametrize(
    ("override", "section", "key", "expected"),
    [
        ("optim.lr=1e-4", "optim", "lr", 1e-4),
        ("optim.grad_clip=null", "optim", "grad_clip", None),
        ("data.fractions=[0.5, 0.3, 0.2]", "data", "fractions", (0.5, 0.3, 0.2)),
        ("data.target=band_gap", "data", "target", "band_gap"),
        ("model.views=se3", "model", "views", "se3"),
    ],
)
def test_override_values_are_yaml(override, section, key, expected):
    assert getattr(getattr(load_config(FinetuneConfig, None, [override]), section), key) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", r"unknown key 'optim.learning_rate'"),
        ("optim.epoch=1", r"unknown key 'optim.epoch' \(did you mean optim.epochs"),
        ("model.chanels=64", r"unknown key 'model.chanels' \(did you mean model.channels"),
        ("lr=1", r"unknown key 'lr' \(did you mean optim.lr"),
        ("optim.lr=-1", r"optim.lr = -1: .*greater than 0"),
        ("optim.batch_size=1", r"optim.batch_size = 1: .*greater than or equal to 2"),
        ("model.channels=0", r"model: channels = 0; it must be at least 1"),
        ("model.channels=many", r"model.channels = 'many': .*integer"),
        ("model.task=pretrain", r"model: task = 'pretrain', but this command trains task 'predict'"),
        ("data.fractions=[0.5, 0.2, 0.2]", r"add up to 0.9, not to 1"),
        ("loss=mae", r"loss = 'mae'"),
        ("optim=3", r"optim = 3"),
        ("optim.epochs=9", r"optim: warmup_epochs = 10 is longer than the run, epochs = 9"),
        ("optim.lr", r"expected section.key=value"),
        (".lr=1", r"expected section.key=value"),
        ("optim.lr=[", r"not valid YAML"),
    ],
)
def test_faults_name_the_key(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(FinetuneConfig, None, [override])


def test_warmup_may_last_the_whole_run():
    optim = load_config(FinetuneConfig, None, ["optim.epochs=10"]).optim
    assert optim.epochs == optim.warmup_epochs == 10


def test_packaged_files_leave_a_checkpoints_graphs_and_views_alone():
    base = {"data": {"max_neighbors": 7, "compat": "comformer"}, "model": {"views": "se3"}}
    for name in ("finetune", "demo_finetune"):
        config = load_config(FinetuneConfig, name, base=base)
        assert (config.data.max_neighbors, config.data.compat, config.model.views) == (7, "comformer", "se3")


def test_all_faults_are_reported_together():
    with pytest.raises(ConfigError, match=r"optim.lr = 0: .*; .*unknown key 'seeed'"):
        load_config(FinetuneConfig, None, ["optim.lr=0", "seeed=1"])


def test_duplicate_key_in_a_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optim:\n  lr: 1\n  lr: 2\n")
    with pytest.raises(ConfigError, match="key 'lr' is given twice"):
        load_config(FinetuneConfig, file)


@pytest.mark.parametrize(("text", "message"), [("a: [", "not valid YAML"), ("- 1\n", "holds a list")])
def test_unusable_file(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(FinetuneConfig, file)


def test_missing_file_lists_the_packaged_ones():
    with pytest.raises(ConfigError, match=r"'nothing.yaml'; the package's own are .*finetune, pretrain"):
        load_config(FinetuneConfig, "nothing.yaml")


def test_held_out_part_is_not_trained_on():
    with pytest.raises(ConfigError, match="held_out = 'train' is also one of the train parts"):
        load_config(PretrainConfig, None, ["data.held_out=train"])
    with pytest.raises(
        ConfigError, match=r"data.train.0 = 'trian': Input should be 'train', 'val', 'test' or ''"
    ):
        load_config(PretrainConfig, None, ["data.train=[trian]"])


def test_command_sets_the_task():
    assert load_config(PretrainConfig, None, ["model.channels=8"]).model == MGTConfig(
        task="pretrain", channels=8
    )
    assert load_config(FinetuneConfig, None, ["model.channels=8"]).model.task == "predict"


def test_resolved_configuration_reads_back(tmp_path):
    config = load_config(PretrainConfig, None, ["optim.lr=3e-4", "data.limit=5", "model.denoising=edge"])
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert yaml.safe_load(file.read_text())["optim"]["lr"] == 3e-4
    assert load_config(PretrainConfig, file) == config
