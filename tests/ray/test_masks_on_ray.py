"""Masks in training on Ray Train's workers, against the trainer in this process."""

import pytest
import ray
import torch
from helpers import images_of, small_run
from torch import nn

from laasp_ray.distributed.cluster import plan_resources
from laasp_ray.distributed.trainer import RayTrainer, put_network
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan
from laasp_ray.pruning.sparsity.groups import GroupRule, group_mask, pack_mask
from laasp_ray.train.loop import EpochPlan, TrainingPhase
from laasp_ray.train.trainer import InProcessTrainer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

KEPT = ("2.weight", "5.weight")


def network():
    """Without BatchNorm, whose statistics are those of a worker's own images: two workers train what one does."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(288, 10),
    )


def epochs_of(trainer, model, masks):
    """Two epochs, and what was measured after them."""
    plans = tuple(EpochPlan(epoch=epoch, data_epoch=epoch, learning_rate=0.02) for epoch in range(2))
    epochs = []
    training_phase = TrainingPhase(number=0, phase="final", epochs=plans, masks=masks)
    return epochs, trainer.run(capture(model, Plan.empty()), {}, training_phase, epochs.append).metrics


def test_two_workers_hold_masks_and_train_what_one_process_does(session, tmp_path):
    config, model = small_run(tmp_path), network()
    share = plan_resources(ray.cluster_resources(), config.cluster)
    assert share.workers == 2
    kept = {name: group_mask(model.get_parameter(name), GroupRule(8, 6)) for name in KEPT}
    masks = {name: pack_mask(mask) for name, mask in kept.items()}
    trainer = RayTrainer(put_network(model), config, share, str(tmp_path), images_of(config))
    try:
        spread, measured = epochs_of(trainer, model, masks)
        again, measured_again = epochs_of(trainer, model, masks)
    finally:
        trainer.close()
    here = InProcessTrainer(model, config, torch.device("cpu"))
    try:
        alone, measured_alone = epochs_of(here, model, masks)
    finally:
        here.close()
    assert len(spread) == len(again) == len(alone) == 2
    for epoch in spread:
        for name, mask in kept.items():
            weight = epoch.tensors[name]
            assert torch.equal(weight != 0, mask) and not torch.signbit(weight[~mask]).any()
            # Momentum would bring it back.
            assert epoch.optimizer_state[f"momentum/{name}"][~mask].count_nonzero() > 0
    for ours, repeated, expected in zip(spread, again, alone, strict=True):
        assert all(torch.equal(tensor, repeated.tensors[name]) for name, tensor in ours.tensors.items())
        # A worker whose masks did not hold would hand the other wrong gradients.
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(ours.tensors[name], tensor, rtol=0, atol=1e-5)
    assert measured == measured_again
    assert measured.loss == pytest.approx(measured_alone.loss, abs=1e-5)
