"""What `rank` is given and cannot work with is refused in one sentence; the caller's things are left as they were."""

import copy

import numpy as np
import pytest
import torch
from plain_losses import mean_loss
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laasp_ray.errors import ConfigError, PruningError, SearchError
from laasp_ray.models.untouched import in_eval_mode
from laasp_ray.search import rank
from laasp_ray.search.evaluate import CalibrationSet

IMAGES = torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 2


class Net(nn.Module):
    def __init__(self, wrap=lambda logits: logits, norm=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv2d(1, 4, 3), norm or nn.Identity(), nn.Conv2d(4, 3, 1)
        self.head, self.wrap = nn.Linear(3, 2), wrap

    def forward(self, x):
        return self.wrap(self.head(self.second(self.norm(self.first(x)).relu()).mean((2, 3))))


LOADER = DataLoader(TensorDataset(IMAGES, LABELS), 2)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES, LABELS.float(), r"labels has type torch\.float32, must be whole numbers"),
        (IMAGES, LABELS.bool(), r"labels has type torch\.bool, must be whole numbers"),
        (IMAGES, torch.eye(2)[LABELS].long(), r"labels has shape \(6, 2\), must be \(n,\)"),
        (IMAGES, LABELS - 1, r"labels has -1, must be class indices from 0 on"),
        (IMAGES, LABELS + 1, r"labels has 2, but the network has 2 outputs, for classes 0 to 1"),
        (IMAGES, LABELS.tolist(), r"labels is a list, must be a tensor"),
        (IMAGES, LABELS.numpy(), r"labels is a ndarray, must be a tensor"),
        (LOADER, LABELS, r"images is a DataLoader, must be a tensor: collect what a loader gives, with torch\.cat"),
        (LOADER, None, r"images is a DataLoader, must be a tensor"),
        (IMAGES[:, 0, 0, 0], LABELS, r"images has shape \(6,\), must have one of its own"),
        (IMAGES, LABELS.to("meta"), r"images is on cpu, labels on meta: move both to the same device"),
        (IMAGES.byte(), LABELS, r"does not take these images, torch\.uint8 of shape \(1, 6, 6\) each .*`prepare`"),
        (torch.randn(6, 3, 6, 6), LABELS, r"does not take these images, torch\.float32 of shape \(3, 6, 6\) each"),
    ],
)
def test_images_and_labels_that_do_not_fit(images, labels, message):
    with pytest.raises(ConfigError, match=message):
        rank(Net(), images, labels)


@pytest.mark.parametrize("count", [0, 5])
def test_as_many_labels_as_images(count):
    with pytest.raises(SearchError, match=f"6 images and {count} labels"):
        rank(Net(), IMAGES, LABELS[:count])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size.*0.*at least 1"),
        ({"batch_size": -3}, r"batch_size.*-3.*at least 1"),
        ({"batch_size": 2.5}, r"batch_size is 2\.5, must be a whole number"),
        ({"batch_size": "8"}, r"batch_size is '8', must be a whole number"),
        ({"batch_size": True}, r"batch_size is True, must be a whole number"),
        ({"memory_mb": -1}, r"memory_mb.*-1.*at least 0"),
        ({"memory_mb": None}, r"memory_mb is None, must be a whole number"),
        ({"racing_error": 0.7}, r"racing_error.*0\.7"),
        ({"compensate": False}, r"compensate is False, must be one of 'off', 'channels', 'full'"),
        ({"compensate": "ful"}, r"compensate is 'ful', must be one of"),
        ({"step": "0.1"}, r"step is '0\.1', must be a finite number"),
        ({"criteria": "l1"}, r"criteria is 'l1', must be a list: \['l1'\]"),
        ({"ignored": "first"}, r"ignored is 'first', must be a list"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        rank(Net(), IMAGES, LABELS, **options)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda logits: {"logits": logits}, "the network gives a dict, must give one tensor"),
        (lambda logits: (logits, logits), "the network gives a tuple, must give one tensor"),
        (lambda logits: logits[:, :, None], r"the network gives a tensor of shape \(1, 2, 1\), must give one tensor"),
    ],
)
def test_outputs_that_are_not_one_tensor_of_classes(wrap, message):
    with pytest.raises(ConfigError, match=message):
        rank(Net(wrap), IMAGES, LABELS)


class Rolled(Net):
    """The channels of both convolutions pass through a roll, which moves them by fixed places."""

    def forward(self, x):
        return self.head(self.second(self.first(x).roll(1, 1)).roll(1, 1).mean((2, 3)))


def test_where_no_layer_can_be_pruned_each_is_named_with_its_reason():
    with pytest.raises(PruningError, match=r"no layer of the network can be pruned \(first: .*roll.*; second: .*roll"):
        rank(Rolled(), IMAGES, LABELS)
    with pytest.raises(PruningError, match=r"\(first: is ignored; second: is ignored\)"):
        rank(Net(), IMAGES, LABELS, ignored=["first", "second"])
    with pytest.raises(PruningError, match=r"\(it has no convolution\)"):
        rank(nn.Sequential(nn.Flatten(), nn.Linear(36, 2)), IMAGES, LABELS)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_any_whole_numbers_are_labels(dtype):
    wanted = [(entry.layer, entry.loss) for entry in rank(Net(), IMAGES, LABELS, step=0.3)]
    assert [(entry.layer, entry.loss) for entry in rank(Net(), IMAGES, LABELS.to(dtype), step=0.3)] == wanted


def test_a_batchnorm_without_running_statistics_is_refused():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ConfigError, match=r"norm is a BatchNorm without running statistics.*track_running_stats=True"):
        rank(Net(norm=norm), IMAGES, LABELS)
    assert len(rank(Net(norm=nn.InstanceNorm2d(4, affine=True)), IMAGES, LABELS, step=0.3))


def test_the_network_and_the_random_state_are_left_as_they_were():
    model = Net(norm=nn.BatchNorm2d(4)).train()
    model.norm.eval()  # frozen
    reference = copy.deepcopy(model)
    before = torch.random.get_rng_state()
    state = copy.deepcopy(model.state_dict())
    kept = IMAGES.clone(), LABELS.clone()
    rank(model, IMAGES, LABELS, step=0.3, reference=reference)
    mean_loss(model, CalibrationSet(IMAGES, LABELS, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (torch.equal(IMAGES, kept[0]), torch.equal(LABELS, kept[1])) == (True, True)
    for network in (model, reference):
        assert {name for name, module in network.named_modules() if not module.training} == {"norm"}
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_a_mode_is_put_back_module_by_module_after_an_error_too():
    model = Net().train()
    model.first.eval()
    with pytest.raises(KeyError), in_eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert {name for name, module in model.named_modules() if not module.training} == {"first"}


def test_noise_of_a_network_takes_nothing_from_the_callers_random_state():
    class Noise(nn.Module):
        def forward(self, x):
            return x + 1e-9 * torch.randn_like(x)

    model = Net(norm=Noise())  # its weights are drawn after torch.manual_seed
    before = torch.random.get_rng_state()
    with pytest.raises(PruningError, match="not deterministic in eval mode"):
        rank(model, IMAGES, LABELS, step=0.3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.isfinite(IMAGES.numpy()).all()
