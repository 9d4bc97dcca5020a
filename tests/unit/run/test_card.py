"""The model card of runs with tasks of their own and of networks of libraries: what it says, and what it does not."""

import dataclasses

import pytest
from own_examples import config_of
from run_events import run_finished

from laasp_ray.config import DataConfig, ModelConfig
from laasp_ray.recipes import recipe
from laasp_ray.records import Metrics
from laasp_ray.run.card import model_card
from laasp_ray.run.finishing import Delivered

OWN = Metrics(loss=0.25, images=10, values={"wrong": 0.125, "top1": 0.5}, better="lower")
PIXELS = ("0.485", "pixel", "resized", "cropped", "resizing", "logits", "classes", "images", "`auto`", "ccuracy")


def card_of(config, metrics=OWN, before=None):
    return model_card(config, run_finished(metrics=metrics), before, Delivered())


def test_data_and_loss_by_import_path(tmp_path):
    config = config_of(tmp_path, data__arguments={"count": 24}, data__collate="own_examples:collated")
    card = card_of(config, before=dataclasses.replace(OWN, loss=0.5, values={"wrong": 0.25, "top1": 0.75}))
    for text in (
        "- input: (examples, 2, 6, 8), as the run's own data set gives them\n"
        "- output: as the network gives it, for the loss below\n",
        "- data: `own_examples:data`, arguments: count=24, collated by `own_examples:collated`\n"
        "- loss: `own_examples:bce`\n"
        "- metrics: wrong, top-1; of wrong, the primary one, lower is better\n",
        "| wrong | 0.2500 | 0.1250 |\n| top-1 | 75.00% | 50.00% |\n| loss | 0.5000 | 0.2500 |",
        "Metrics and loss are on 10 test examples; the unpruned network's are of just before the first prune.",
        "it needs torch, safetensors and the builder's own package",
    ):
        assert text in card, text
    assert not [word for word in PIXELS if word in card]


def test_python_objects(tmp_path):
    card = card_of(config_of(tmp_path, data__factory="given", train__loss="given", train__metrics={}))
    given = "a Python object that the run was given"
    assert f"- data: {given}\n- loss: {given}\n- metrics: wrong, top-1; of wrong" in card
    assert "given`" not in card and not [word for word in PIXELS if word in card]


def test_a_loss_alone_is_its_own_metric(tmp_path):
    card = card_of(config_of(tmp_path, train__metrics={}), metrics=Metrics(loss=0.25, images=10))
    assert "- loss: `own_examples:bce`\n- seed" in card and "- metrics" not in card


def test_own_data_without_a_loss_are_classified(tmp_path):
    card = card_of(
        config_of(tmp_path, train__loss="", train__metrics={}), Metrics(loss=1.0, top1=0.5, top5=1.0, images=10)
    )
    assert "- output: logits, (examples, classes)" in card and "- loss: cross-entropy\n" in card
    assert "- metrics: top-1, top-5; of top-1, the primary one, higher is better" in card and "pixel" not in card


def test_a_loss_of_one_s_own_on_images_says_how_these_are_normalised(tmp_path):
    config = dataclasses.replace(
        config_of(tmp_path),
        model=ModelConfig(builder="own_examples:network", input_shape=(3, 8, 8)),
        data=DataConfig(format="folder", mean=(0.5, 0.25, 0.125), image_size=8),
    )
    card = card_of(config)
    assert "float32, (images, 3, 8, 8); each pixel, in 0 to 1, less the mean (0.5, 0.25, 0.125)" in card
    assert "- output: as the network gives it" in card and "- data: `folder`\n" in card and "10 test images" in card


@pytest.mark.parametrize(
    ("builder", "package"),
    [
        ("torchvision.resnet50", "torchvision"),
        ("timm.convnext_atto", "timm"),
        ("transformers.resnet", "transformers"),
        ("cifar.resnet20", "nothing else"),
        ("zoo.mobilenet_v1", "nothing else"),
        ("timm.models:create_model", "the builder's own package"),
    ],
)
def test_what_loading_needs(builder, package):
    config = recipe("resnet50_digits")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, builder=builder))
    card = card_of(config, Metrics(loss=1.0, top1=0.5, top5=1.0, images=355))
    assert f"(it needs torch, safetensors and {package});" in card
    assert "- output: logits, (images, classes)" in card and "on 355 test images" in card
