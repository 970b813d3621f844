import pytest

from mgt_fast.checkpoint import CheckpointMeta, save_checkpoint
from mgt_fast.config import MGTConfig
from mgt_fast.model import MGT
from mgt_fast.studies.recipe import changed, fit_pretraining, load_recipe
from mgt_fast.train.config import ConfigError, PretrainConfig, load_config


def test_the_partner_of_a_packaged_configuration_gives_the_sizes():
    recipe = load_recipe("demo_finetune")
    demo = load_config(PretrainConfig, "demo_pretrain")
    assert recipe.pretraining == demo
    assert recipe.finetuning.model.channels == demo.model.channels == 64
    assert recipe.finetuning.data.max_neighbors == demo.data.max_neighbors == 12
    assert load_recipe().pretraining == PretrainConfig()
    assert load_recipe("demo_finetune", pretraining="pretrain").pretraining == PretrainConfig()


def test_what_is_set_for_fine_tuning_holds_for_both(tmp_path):
    sets = [
        "model.channels=8",
        "data.shell_tolerance=0.01",
        "device=cpu",
        "threads=1",
        f"data.path={tmp_path}",
    ]
    recipe = load_recipe("demo_finetune", sets, None, ["optim.epochs=7"])
    for config in (recipe.finetuning, recipe.pretraining):
        assert (config.model.channels, config.data.shell_tolerance) == (8, 0.01)
        assert (config.device, config.threads, config.data.path) == ("cpu", 1, tmp_path)
    assert (recipe.pretraining.optim.epochs, recipe.finetuning.optim.epochs) == (7, 12)
    assert recipe.pretraining.model.denoising == "edge"  # the pretraining's own


def test_a_source_of_its_own_keeps_its_crystals_and_parts(tmp_path):
    sets = [f"data.path={tmp_path}", "data.fractions=[0.8,0.1,0.1]"]
    assert load_recipe(None, sets).pretraining.data.fractions == (0.8, 0.1, 0.1)
    own = load_recipe(None, sets, None, [f"data.path={tmp_path / 'source'}"]).pretraining.data
    assert (own.path, own.fractions) == (tmp_path / "source", None)
    bundled = load_recipe(None, sets, same_crystals=False).pretraining.data
    assert (bundled.path, bundled.fractions) == (None, None)


def test_contradictions_name_the_key():
    with pytest.raises(ConfigError, match=r"data\.max_neighbors = 9 for pretraining and 6 for fine-tuning"):
        load_recipe(None, ["data.max_neighbors=6"], None, ["data.max_neighbors=9"])


def test_a_checkpoint_gives_the_sizes(tmp_path):
    config = MGTConfig(task="pretrain", channels=8, num_scalars=4, num_vectors=2, num_blocks=1)
    meta = CheckpointMeta(model=config, max_neighbors=7)
    save_checkpoint(tmp_path / "c.safetensors", MGT(config), meta)
    recipe = load_recipe("demo_finetune", start=tmp_path / "c.safetensors")
    assert (recipe.finetuning.model.channels, recipe.finetuning.data.max_neighbors) == (8, 7)
    assert (recipe.pretraining.model.channels, recipe.pretraining.data.max_neighbors) == (8, 7)


def test_changes_leave_the_rest_alone():
    base = load_recipe("demo_finetune", ["data.fractions=[0.5,0.25,0.25]"]).finetuning
    other = changed(base, "model.views=se3", "seed=4")
    assert (other.model.views, other.seed) == ("se3", 4)
    assert changed(other, "model.views=both", f"seed={base.seed}") == base
    one_view = fit_pretraining(PretrainConfig(), other)
    assert (one_view.model.views, one_view.model.task, one_view.data.fractions) == ("se3", "pretrain", None)
