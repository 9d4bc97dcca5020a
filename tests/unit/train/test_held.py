"""Masks held through real optimizer steps, with momentum and weight decay."""

import dataclasses
import pickle

import pytest
import torch
from torch import nn

from laasp_ray.config import TrainConfig
from laasp_ray.data.loaders.reading import Batch
from laasp_ray.errors import TrainingError
from laasp_ray.pruning.plan import Plan, apply_plan
from laasp_ray.pruning.sparsity.groups import GroupRule, group_mask, pack_mask
from laasp_ray.tasks import CLASSIFICATION
from laasp_ray.train.loop import EpochPlan, TrainingPhase, run_training_phase
from laasp_ray.train.mask_enforcement import MaskEnforcer

CONFIG = TrainConfig(epochs=1, prune_epoch=0, batch_size=4, momentum=0.9, nesterov=True, weight_decay=0.1)


class Pictures:
    """What `run_training_phase` needs of a PhaseData: twelve random pictures of 8 x 8 pixels, of three classes."""

    device = torch.device("cpu")
    task = CLASSIFICATION
    rank, world, parts, own_parts, share, train_images, test_images = 0, 1, 1, (0,), 4, 12, 12

    class Loader:
        name = "in memory"
        in_background = True

        def epoch(self, batches, epoch=0):
            images = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(5))
            for indices in batches:
                yield Batch(images[indices], torch.arange(12)[indices] % 3, indices)

    train_loader = test_loader = Loader()

    def take_unreadable(self):
        return ()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 3)
    )


def kept_of(model, *names):
    return {name: group_mask(model.get_parameter(name), GroupRule(4, 3)) for name in names}


def train(model, kept, *, epochs=2, done=0, optimizer_state=None, ema=0.0):
    plans = tuple(EpochPlan(epoch=i, data_epoch=i, learning_rate=0.1) for i in range(epochs))
    masks = {name: pack_mask(mask) for name, mask in kept.items()}
    training_phase = TrainingPhase(number=0, phase="final", epochs=plans, done=done, masks=masks)
    config = dataclasses.replace(CONFIG, ema=ema)
    *finished, _ = run_training_phase(
        model, optimizer_state or {}, training_phase, data=Pictures(), config=config, seed=1
    )
    return finished


def check_held(model, kept, before):
    for name, mask in kept.items():
        weight = model.get_parameter(name).detach()
        assert (weight[~mask] == 0).all() and not torch.signbit(weight[~mask]).any()
        # Weight decay alone moves every weight that is not zero.
        assert (weight[mask] != 0).all() and (weight[mask] != before[name][mask]).all()


def test_what_is_pruned_stays_zero_and_everything_else_is_trained():
    model = network()
    kept = kept_of(model, "3.weight", "5.weight")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    epochs = train(model, kept)
    check_held(model, kept, before)
    assert (model.get_parameter("0.weight") != before["0.weight"]).all()
    # Of every epoch's weights, not only of the last: they are what a run is resumed from.
    assert all((done.tensors["3.weight"][~kept["3.weight"]] == 0).all() for done in epochs)
    # Without the mask momentum and weight decay bring every weight back.
    assert all(done.optimizer_state["momentum/3.weight"].count_nonzero() == kept["3.weight"].numel() for done in epochs)


def test_without_masks_the_weights_come_back():
    model = network()
    kept = kept_of(model, "3.weight")
    model.get_parameter("3.weight").data *= kept["3.weight"]
    train(model, {})
    assert (model.get_parameter("3.weight") != 0).all()


def test_on_a_filter_pruned_network():
    model = network()
    left = ((0, 2, 3, 4, 6, 7),)
    norm = {f"1.{name}": {0: left} for name in ("weight", "bias", "running_mean", "running_var")}
    attributes = {"0": {"out_channels": 6}, "1": {"num_features": 6}, "3": {"in_channels": 6}}
    tensors = {"0.weight": {0: left}, "0.bias": {0: left}, "3.weight": {1: left}, **norm}
    apply_plan(model, Plan(tensors=tensors, attributes=attributes))
    kept = kept_of(model, "3.weight")
    # Six inputs are groups of 4 and 2, which keep 1 and ceil(2 / 4) = 1.
    assert (kept["3.weight"].sum(1) == 2).all()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, kept)
    check_held(model, kept, before)


def test_the_average_and_what_it_is_of_have_the_same_zeros():
    model = network()
    kept = kept_of(model, "3.weight", "5.weight")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    epochs = train(model, kept, ema=0.9)
    check_held(model, kept, before)
    for done in epochs:
        for name, mask in kept.items():
            for tensor in (done.tensors[name], done.optimizer_state[f"weights/{name}"]):
                assert torch.equal(tensor != 0, mask) and not torch.signbit(tensor[~mask]).any()
    assert torch.equal(model.get_parameter("3.weight"), epochs[-1].tensors["3.weight"])


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_training_phase_that_is_cut_off_goes_on_to_the_same_weights(ema):
    whole, cut = network(), network()
    kept = kept_of(whole, "3.weight")
    first, _ = train(whole, kept, ema=ema)
    cut.load_state_dict(first.tensors)
    train(cut, kept, done=1, optimizer_state=first.optimizer_state, ema=ema)
    assert all(torch.equal(tensor, cut.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_a_training_phase_of_no_epochs_has_its_zeros_too():
    model = network()
    kept = kept_of(model, "3.weight")
    assert train(model, kept, epochs=0) == []
    assert (model.get_parameter("3.weight")[~kept["3.weight"]] == 0).all()


def test_masks_take_the_memory_format_of_their_weights():
    model = network().to(memory_format=torch.channels_last)
    kept = kept_of(model, "3.weight")
    MaskEnforcer(model, {"3.weight": pack_mask(kept["3.weight"])}).apply()
    weight = model.get_parameter("3.weight")
    assert torch.equal(weight != 0, kept["3.weight"]) and weight.is_contiguous(memory_format=torch.channels_last)


def test_a_training_phase_with_masks_travels_to_other_processes():
    training_phase = TrainingPhase(number=1, phase="final", masks={"3.weight": b"\x01\x02"})
    assert pickle.loads(pickle.dumps(training_phase)) == training_phase


def test_a_mask_for_nothing_is_named():
    with pytest.raises(TrainingError, match=r"a mask for 7\.weight"):
        MaskEnforcer(network(), {"7.weight": b""})
