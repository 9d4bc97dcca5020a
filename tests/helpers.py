"""Helpers of several tests: a small run on the built-in digits, and networks whose BatchNorms have an effect."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.cross_decomposition import PLSRegression
from sklearn.datasets import load_digits
from torch import nn

from laasp_ray.config import FilterPruneConfig, RunConfig
from laasp_ray.config.methods import with_method
from laasp_ray.cost.macs import count_macs
from laasp_ray.data.sources.identity import digest_of_names
from laasp_ray.data.sources.registry import open_source
from laasp_ray.methods.base import IterationContext, IterationResult, OnCandidate, PruningMethod
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan, apply_plan
from laasp_ray.pruning.verify import clone_sharing_parameters
from laasp_ray.recipes import recipe
from laasp_ray.search.candidates import measure_baseline
from laasp_ray.search.executor import Executor

SHARED_DATA = Path(__file__).parents[1] / ".." / "shared" / "data"


def shared_data(name: str) -> Path:
    """A folder or file of the development data next to the checkout. Without it the test is skipped with a message."""
    path = (SHARED_DATA / name).resolve()
    if not path.exists():
        pytest.skip(f"needs shared/data/{name} beside the checkout")
    return path


def randomise_batchnorm(model: nn.Module, seed: int = 0) -> nn.Module:
    """Sets random affine values and statistics. In a new network many prunes would change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
            ):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model


def vip_by_scikit_learn(features: torch.Tensor, labels: torch.Tensor, components: int) -> torch.Tensor:
    """VIP (D,) of features (n, D) for class labels (n,), from scikit-learn's scores, weights and loadings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at this tolerance it warns that it did not converge
        one_hot = torch.nn.functional.one_hot(labels).double().numpy()
        fit = PLSRegression(components, scale=True, tol=1e-16, max_iter=20_000).fit(features.double().numpy(), one_hot)
    scores, weights, loadings = map(torch.from_numpy, (fit.x_scores_, fit.x_weights_, fit.y_loadings_))
    explained = scores.square().sum(dim=0) * loadings.square().sum(dim=0)
    directions = (weights / weights.norm(dim=0)).square()
    return (len(weights) * directions @ explained / explained.sum()).sqrt()


def write_pictures(root: Path, *, side: int, train: int, test: int) -> Path:
    """Writes a folder data set of three classes a, b and c: noise, brighter in the channel of the class."""
    for split, count in (("train", train), ("val", test)):
        for number in range(count):
            pixels = np.random.default_rng([number, split == "val"]).integers(0, 128, (side, side, 3), np.uint8)
            pixels[:, :, number % 3] += 100
            path = root / split / "abc"[number % 3] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


def write_digits(root: Path, *, side: int, train: int, test: int) -> Path:
    """Writes a folder data set of three classes 0, 1 and 2: handwritten digits, enlarged from 8 x 8 to side x side."""
    digits = load_digits(n_class=3)
    unused = [iter(digits.images[digits.target == label]) for label in range(3)]
    for split, count in (("train", train), ("val", test)):
        for number in range(count):
            grey = Image.fromarray(np.rint(next(unused[number % 3]) * (255 / 16)).astype(np.uint8))
            path = root / split / str(number % 3) / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey.resize((side, side), Image.Resampling.BICUBIC).convert("RGB").save(path)
    return root


def small_run(storage: Path, **changes: Any) -> RunConfig:
    """ResNet-20 on the digits at 16 x 16: a whole run of a few iterations in seconds. `changes`: section__key=value."""
    settings = recipe("resnet20_cifar10").to_dict()
    settings |= {"name": "small", "storage": str(storage)}
    settings["model"]["input_shape"] = [3, 16, 16]
    settings["data"] |= {
        "path": None,
        "format": "digits",
        "train_transform": "random_resized_crop",
        "image_size": 16,
        "eval_resize": 16,
        "scale": [0.8, 1.0],
        "flip": 0.0,
        "threads": 1,
    }
    settings["prune"] |= {"flops_reduction": 0.12, "step": 0.03, "fine_tune_every": 0.05, "criteria": ["l1", "cosine"]}
    settings["search"] |= {"images": 40, "batch_size": 20}
    settings["train"] |= {"epochs": 3, "prune_epoch": 2, "batch_size": 128, "drop_epochs": [2], "learning_rate": 0.05}
    settings["cluster"]["workers"] = 2
    settings["export"] |= {"format": "none", "latency": []}
    if "prune__method" in changes:
        settings["prune"] = with_method(settings["prune"], changes["prune__method"])
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            settings[section][name] = value
        else:
            settings[section] = value
    return RunConfig.from_dict(settings)


def images_of(config: RunConfig) -> tuple[str, str]:
    """The digests of the training and the test images, as the trainers on Ray compare them."""
    return digest_of_names(open_source(config.data, "train")), digest_of_names(open_source(config.data, "test"))


def first_standing(
    model: nn.Module,
    example: torch.Tensor,
    config: FilterPruneConfig,
    executor: Executor,
    on_candidate: OnCandidate = lambda done, total, entry: None,
) -> IterationContext[Any]:
    """The context of a run's first iteration. `model` is the unpruned network."""
    return IterationContext(
        model=model,
        network=capture(model, Plan.empty()),
        example_input=example,
        baseline=measure_baseline(PruningGraph(model, example), count_macs(model, example), config),
        config=config,
        executor=executor,
        iteration=1,
        on_candidate=on_candidate,
    )


def iterations_of(
    method: PruningMethod[Any], first: IterationContext[Any]
) -> Iterator[tuple[IterationResult, nn.Module, nn.Module]]:
    """Yields iteration after iteration, each on the physically pruned network: (iteration, network before, network
    after).
    """
    now = first
    for number in itertools.count(2):
        iteration = method.iterate(now)
        assert iteration.step is not None
        after = clone_sharing_parameters(now.model)
        apply_plan(after, iteration.step)
        yield iteration, now.model, after
        network = capture(after, now.network.plan.then(iteration.step))
        now = replace(now, model=after, network=network, iteration=number)
