"""A training phase without Ray: steps worked out by hand, one rank against two, and a training phase that is cut
off."""

import dataclasses
import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import write_pictures
from torch import nn
from torch.nn import functional
from training_by_hand import CONFIG, CPU, DECAYING, GRADIENT, PLAIN, ROWS, TWO, FakeData, linear, train, training_phase

from laasp_ray.config import DataConfig
from laasp_ray.data.ordering import epoch_batches
from laasp_ray.errors import TrainingError
from laasp_ray.pruning.sparsity.groups import GroupRule, group_mask, pack_mask
from laasp_ray.train.data import PhaseData
from laasp_ray.train.ddp import distributed
from laasp_ray.train.loop import evaluate, run_training_phase

TRAIN_IMAGES, TEST_IMAGES, CLASSES = 22, 19, 3
OPTIONS = dataclasses.replace(CONFIG, label_smoothing=0.1, ema=0.9, distill=0.5)
# CONFIG's training batches are of 8, 7 and 7: two ranks get 4 + 4 and 4 + 3. Test images: 10 and 9, in batches of 8.


def test_first_step_of_sgd_with_nesterov_momentum_and_weight_decay():
    # The buffer starts as g, the step is g + 0.9 g, the weights lose 0.5 of it.
    (epoch,), _ = train(linear(ROWS), TWO, training_phase(0.5), config=DECAYING)
    torch.testing.assert_close(epoch.tensors["weight"], torch.tensor([[1.1425, 1.5725], [0.6675, 2.0475]]))
    torch.testing.assert_close(epoch.optimizer_state["momentum/weight"], GRADIENT)
    assert epoch.loss == pytest.approx(math.log(2), abs=1e-6)
    assert (epoch.top1, epoch.images, epoch.position, epoch.plan.epoch) == (0.5, 2, 0, 7)


def test_step_with_the_momentum_of_the_epoch_before():
    # Buffer 0.9 v + g, step g + 0.9 of the buffer.
    before = {"momentum/weight": torch.tensor([[1.0, 0.0], [0.0, 0.0]])}
    (epoch,), _ = train(linear(ROWS), TWO, training_phase(0.5), optimizer_state=before, config=DECAYING)
    torch.testing.assert_close(epoch.optimizer_state["momentum/weight"], torch.tensor([[0.75, 0.45], [0.35, -0.05]]))
    torch.testing.assert_close(epoch.tensors["weight"], torch.tensor([[0.7375, 1.5725], [0.6675, 2.0475]]))
    assert torch.equal(before["momentum/weight"], torch.tensor([[1.0, 0.0], [0.0, 0.0]]))  # a copy was trained on


@pytest.mark.parametrize("rate", [0.5, 0.125])
def test_learning_rate_of_the_epoch_is_the_one_used(rate):
    (first, second), _ = train(linear(ROWS), TWO, training_phase(rate, 0.0), config=PLAIN)
    gradient = torch.tensor([[-0.25, 0.25], [0.25, -0.25]])
    torch.testing.assert_close(first.tensors["weight"], torch.tensor(ROWS) - rate * gradient)
    assert torch.equal(second.tensors["weight"], first.tensors["weight"])
    assert [epoch.plan.learning_rate for epoch in (first, second)] == [rate, 0.0]


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_an_epochs_tensors_are_not_changed_by_the_next_epoch(ema):
    config = dataclasses.replace(DECAYING, ema=ema)
    running = run_training_phase(linear(ROWS), {}, training_phase(0.5, 0.5), data=TWO, config=config, seed=3)
    first = next(running)
    kept = {name: tensor.clone() for name, tensor in [*first.tensors.items(), *first.optimizer_state.items()]}
    second = next(running)
    assert all(
        torch.equal(tensor, kept[name]) for name, tensor in [*first.tensors.items(), *first.optimizer_state.items()]
    )
    assert not torch.equal(second.tensors["weight"], first.tensors["weight"])


def test_evaluation_by_hand():
    # The network hands its input on, so the images are the logits. Six classes: the least of them is not in the top 5.
    logits = [[3.0, 2, 1, 0, -1, -2], [3.0, 2, 1, 0, -1, -2], [3.0, 2, 1, 0, -1, -2], [0.0, 0, 0, 0, 0, 5]]
    metrics = evaluate(nn.Identity(), FakeData(logits, [0, 4, 5, 5]))
    total = math.log(sum(math.exp(value) for value in logits[0]))
    alone = math.log(5 + math.exp(5))
    assert metrics.loss == pytest.approx(((total - 3) + (total + 1) + (total + 2) + (alone - 5)) / 4, rel=1e-6)
    assert (metrics.top1, metrics.top5, metrics.images) == (2 / 4, 3 / 4, 4)


def test_top_5_of_fewer_than_5_classes_is_certain():
    metrics = evaluate(nn.Identity(), FakeData([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]], [0, 0]))
    assert (metrics.top1, metrics.top5, metrics.images) == (0.5, 1.0, 2)


def test_a_training_phase_without_epochs_only_evaluates():
    model = nn.Sequential(nn.Dropout(0.9), linear(ROWS))
    epochs, done = train(model, TWO, training_phase())
    assert epochs == [] and done.metrics.loss == pytest.approx(math.log(2), rel=1e-6)
    assert torch.equal(model[1].weight, torch.tensor(ROWS))


@pytest.mark.parametrize(
    ("scale", "rates", "message"),
    [
        # Weights of about 1e37 are finite still; times 1e3 they are not.
        (1e3, (0.1, 1e34, 0.1), r"training loss of epoch 9 \(learning rate 0\.1\) is not finite"),
        (1, (0.1, math.inf), r"after epoch 8 \(learning rate inf\) 1 tensors are not finite: weight"),
    ],
)
def test_training_that_is_not_finite_names_the_epoch(scale, rates, message):
    data = FakeData([[scale, 0.0], [0.0, scale]], [0, 1])
    seen = []
    with pytest.raises(TrainingError, match=message):
        for epoch in run_training_phase(linear(ROWS), {}, training_phase(*rates), data=data, config=DECAYING, seed=3):
            seen.append(epoch.position)
    assert seen == list(range(len(rates) - 1))


class Recording(nn.Linear):
    """A layer that keeps the dropout mask it drew; without it the weights have no gradient but zero."""

    def forward(self, x):
        if self.training:
            self.mask = functional.dropout(torch.ones(256), 0.5)
        return super().forward(x)


def mask_of(data_epoch, rank=0, scramble=0):
    torch.manual_seed(scramble)
    model = Recording(2, 2)
    data = FakeData(TWO.images.tolist() * 2, [0, 1, 0, 1], rank, 2)
    train(model, data, training_phase(0.1, first=data_epoch), config=dataclasses.replace(DECAYING, batch_size=4))
    return model.mask


def test_dropout_is_decided_by_the_epoch_and_the_rank_not_by_what_was_drawn_before():
    assert torch.equal(mask_of(5), mask_of(5, scramble=1))
    assert not torch.equal(mask_of(5), mask_of(6))
    assert not torch.equal(mask_of(5), mask_of(5, rank=1))


def make_folder(root, junk=()):
    """8 x 8 pictures; the files named in `junk` are cut short."""
    write_pictures(root, side=8, train=TRAIN_IMAGES, test=TEST_IMAGES)
    for name in junk:
        (root / name).write_bytes((root / name).read_bytes()[:60])
    return root


def folder_config(root, loader="torchvision"):
    return DataConfig(path=str(root), format="folder", image_size=8, eval_resize=8, threads=1, loader=loader)


def opened(config, rank=0, world=1, excluded=(), batch_size=8, parts=None):
    return PhaseData(
        config, batch_size=batch_size, seed=3, device=CPU, rank=rank, world=world, parts=parts, excluded=excluded
    )


def small_network(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), *more, nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))


class WithUnusedHead(nn.Module):
    """In training `other` runs in place of `head`, which gets no gradient."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.other = small_network(), nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES)

    def forward(self, x):
        x = self.body(x)
        return self.other(x) if self.training else self.head(x)


def kept_weights():
    return group_mask(small_network().get_parameter("3.weight"), GroupRule(8, 6))


def masked(what):
    return dataclasses.replace(what, masks={"3.weight": pack_mask(kept_weights())})


def another_network():
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, CLASSES))


def with_batchnorm():
    return small_network(nn.BatchNorm2d(4), nn.Dropout(0.3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


def run_alone(where, what, model, parts=None, **options):
    data = opened(where, excluded=what.excluded, parts=parts)
    try:
        return train(model, data, what, **options)
    finally:
        data.close()


def one_of_two(rank, root, out):
    """One of two ranks under DistributedDataParallel; the other is in another process."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=200)
    )
    data, in_three = opened(folder_config(root), rank, 2), opened(folder_config(root), rank, 2, parts=3)

    def result(model, what, **options):
        return train(model, data, what, wrap=nn.parallel.DistributedDataParallel, **options)

    try:
        results = {
            "plain": result(small_network(), training_phase(0.1, 0.05)),
            "options": result(small_network(), training_phase(0.1, 0.05), config=OPTIONS, teacher=another_network()),
            "masked": result(small_network(), masked(training_phase(0.1, 0.05))),
            "batchnorm": result(with_batchnorm(), training_phase(0.1)),
            "batchnorm, averaged": result(with_batchnorm(), training_phase(0.1), config=OPTIONS),
            "unused": train(
                WithUnusedHead(),
                data,
                training_phase(0.1, 0.05),
                wrap=lambda model: distributed(model, (3, 8, 8), CONFIG),
            ),
            "three parts": train(
                with_batchnorm(),
                in_three,
                training_phase(0.1, 0.05),
                config=OPTIONS,
                wrap=lambda model: distributed(model, (3, 8, 8), OPTIONS),
            ),
        }
        torch.save(results, f"{out}/{rank}.pt")
    finally:
        data.close()
        in_three.close()
        dist.destroy_process_group()


def second_of_two(_, root, out):
    one_of_two(1, root, out)


@pytest.fixture(scope="module")
def ranks(folder, tmp_path_factory):
    """What each of two ranks came to."""
    out = tmp_path_factory.mktemp("ranks")
    other = mp.spawn(second_of_two, (str(folder), str(out)), nprocs=1, join=False)
    one_of_two(0, str(folder), str(out))
    while not other.join():
        pass
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_a_parameter_without_a_gradient_does_not_end_training_on_two_ranks(folder, ranks):
    epochs, _ = run_alone(folder_config(folder), training_phase(0.1, 0.05), WithUnusedHead())
    for rank in ranks:
        theirs, _ = rank["unused"]
        assert len(theirs) == 2
        for name, tensor in epochs[-1].tensors.items():
            torch.testing.assert_close(theirs[-1].tensors[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "options", "masked"])
def test_two_ranks_train_and_measure_what_one_does(folder, ranks, kind):
    options = {"config": OPTIONS, "teacher": another_network()} if kind == "options" else {}
    what = masked(training_phase(0.1, 0.05)) if kind == "masked" else training_phase(0.1, 0.05)
    epochs, done = run_alone(folder_config(folder), what, small_network(), **options)
    for their_epochs, their_done in (rank[kind] for rank in ranks):
        assert len(their_epochs) == len(epochs) == 2
        for theirs, ours in zip(their_epochs, epochs, strict=True):
            for tensors, expected in ((theirs.tensors, ours.tensors), (theirs.optimizer_state, ours.optimizer_state)):
                assert tensors.keys() == expected.keys()
                for name, tensor in expected.items():
                    torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-6)
            assert (theirs.images, theirs.top1) == (ours.images, ours.top1)
            assert theirs.loss == pytest.approx(ours.loss, abs=1e-6)
        # After the first epoch all ranks ask the test images together; the last one's is the evaluation at the end.
        assert their_epochs[0].metrics.loss == pytest.approx(epochs[0].metrics.loss, abs=1e-6)
        assert (their_epochs[0].metrics.top1, their_epochs[0].metrics.images) == (epochs[0].metrics.top1, TEST_IMAGES)
        assert their_epochs[1].metrics is epochs[1].metrics is None
        assert their_done.metrics.images == done.metrics.images == TEST_IMAGES
        assert (their_done.metrics.top1, their_done.metrics.top5) == (done.metrics.top1, 1.0)
        assert their_done.metrics.loss == pytest.approx(done.metrics.loss, abs=1e-6)
    for one, other in zip(*(rank[kind][0] for rank in ranks), strict=True):
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_what_is_masked_is_zero_on_both_ranks(ranks):
    for epochs, _ in (rank["masked"] for rank in ranks):
        for epoch in epochs:
            assert torch.equal(epoch.tensors["3.weight"] != 0, kept_weights())
            # It is held, not merely never moved.
            assert epoch.optimizer_state["momentum/3.weight"][~kept_weights()].count_nonzero() > 0


@pytest.mark.parametrize("kind", ["batchnorm", "batchnorm, averaged"])
def test_two_ranks_agree_on_batchnorms_statistics(folder, ranks, kind):
    # They are each rank's own until they are agreed upon: what is measured must be what is saved.
    ((one,), measured), ((other,), _) = (rank[kind] for rank in ranks)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    assert all(torch.equal(one.optimizer_state[name], other.optimizer_state[name]) for name in one.optimizer_state)
    saved = with_batchnorm()
    saved.load_state_dict(one.tensors)
    _, alone = run_alone(folder_config(folder), training_phase(), saved)
    assert alone.metrics.loss == pytest.approx(measured.metrics.loss, rel=1e-6)
    assert alone.metrics.top1 == measured.metrics.top1


@pytest.mark.parametrize(("kind", "parts", "config"), [("batchnorm", 2, CONFIG), ("three parts", 3, OPTIONS)])
def test_parts_decide_what_is_trained_and_not_the_number_of_ranks(folder, ranks, kind, parts, config):
    """BatchNorm sees the same images together, and dropout draws the same, on two ranks and on one."""
    phase = training_phase(0.1) if parts == 2 else training_phase(0.1, 0.05)
    epochs, done = run_alone(folder_config(folder), phase, with_batchnorm(), parts=parts, config=config)
    theirs, their_done = ranks[0][kind]
    for one, other in zip(theirs, epochs, strict=True):
        for name, tensor in other.tensors.items():
            torch.testing.assert_close(one.tensors[name], tensor, rtol=0, atol=1e-6)
        assert (one.images, one.top1) == (other.images, other.top1)
        assert one.loss == pytest.approx(other.loss, abs=1e-6)
    assert their_done.metrics.loss == pytest.approx(done.metrics.loss, abs=1e-6)
    whole, _ = run_alone(folder_config(folder), phase, with_batchnorm(), config=config)
    assert not torch.allclose(whole[-1].tensors["1.running_mean"], epochs[-1].tensors["1.running_mean"], atol=1e-4)
    assert not torch.allclose(whole[-1].tensors["0.weight"], epochs[-1].tensors["0.weight"], atol=1e-4)


def test_a_part_is_a_batch_of_its_own_whose_gradients_are_added():
    """Of four images in two parts each part's BatchNorm subtracts its own mean; with one part it is that of all."""
    images, labels = [[0.0], [2.0], [10.0], [14.0]], [0, 1, 0, 1]
    seen = []

    class Seeing(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(1, affine=False, momentum=0.5), nn.Linear(1, 2)

        def forward(self, x):
            if self.training:
                seen.append(sorted(x[:, 0].tolist()))
            return self.linear(self.norm(x))

    means = {}
    for parts in (1, 2):
        data = FakeData(images, labels)
        data.parts, data.own_parts = parts, tuple(range(parts))
        (epoch,), _ = train(Seeing(), data, training_phase(0.1), config=dataclasses.replace(PLAIN, batch_size=4))
        means[parts] = float(epoch.tensors["norm.running_mean"])
        assert int(epoch.tensors["norm.num_batches_tracked"]) == 1 and epoch.images == 4
    whole, first, second = seen
    assert whole == [0.0, 2.0, 10.0, 14.0] and sorted([*first, *second]) == whole
    assert means[1] == pytest.approx(0.5 * 26 / 4)
    assert means[2] == pytest.approx(0.5 * sum(first) / 2)  # part 0's alone


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_training_phase_that_was_cut_off_ends_in_the_same_weights(folder, done, ema):
    config, rates, options = folder_config(folder), (0.1, 0.1, 0.02), dataclasses.replace(CONFIG, ema=ema)
    whole, measured = run_alone(config, training_phase(*rates), with_batchnorm(), config=options)
    last = whole[done - 1]
    resumed = with_batchnorm()
    resumed.load_state_dict(last.tensors)
    torch.manual_seed(99)
    rest, again = run_alone(
        config, training_phase(*rates, done=done), resumed, optimizer_state=last.optimizer_state, config=options
    )
    assert [epoch.position for epoch in rest] == list(range(done, 3))
    for ours, theirs in zip(rest, whole[done:], strict=True):
        assert (
            ours.tensors.keys() == theirs.tensors.keys()
            and ours.optimizer_state.keys() == theirs.optimizer_state.keys()
        )
        assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors)
        assert all(
            torch.equal(ours.optimizer_state[name], theirs.optimizer_state[name]) for name in theirs.optimizer_state
        )
        assert (ours.loss, ours.top1, ours.images) == (theirs.loss, theirs.top1, TRAIN_IMAGES)
        assert ours.metrics == theirs.metrics and (ours.metrics is None) == (ours.position == 2)
    assert again.metrics == measured.metrics


@pytest.mark.parametrize(("ema", "part"), [(0.0, "momentum/"), (0.9, "momentum/"), (0.9, "weights/")])
def test_without_what_it_carries_a_training_phase_goes_on_differently(folder, ema, part):
    config, options = folder_config(folder), dataclasses.replace(CONFIG, ema=ema)
    whole, _ = run_alone(config, training_phase(0.1, 0.1), with_batchnorm(), config=options)
    assert any(name.startswith(part) for name in whole[0].optimizer_state)
    rest = {name: tensor for name, tensor in whole[0].optimizer_state.items() if not name.startswith(part)}
    resumed = with_batchnorm()
    resumed.load_state_dict(whole[0].tensors)
    (last,), _ = run_alone(config, training_phase(0.1, 0.1, done=1), resumed, optimizer_state=rest, config=options)
    assert not torch.equal(last.tensors["0.weight"], whole[1].tensors["0.weight"])


def test_training_learns(folder):
    epochs, done = run_alone(folder_config(folder), training_phase(*[0.02] * 8), small_network())
    assert epochs[-1].loss < epochs[0].loss / 2
    assert done.metrics.top1 > 0.9


@pytest.mark.parametrize("loader", ["torchvision", "dali"])
def test_unreadable_images_are_left_out_and_told_once(tmp_path, loader):
    bad, bad_test = "train/a/003.png", "val/b/004.png"
    config = folder_config(make_folder(tmp_path, junk=(bad, bad_test)), loader)
    epochs, done = run_alone(config, training_phase(0.01, 0.01), small_network())
    assert [epoch.unreadable for epoch in epochs] == [(bad, bad_test), ()]
    assert [epoch.images for epoch in epochs] == [TRAIN_IMAGES - 1] * 2
    assert done.unreadable == () and epochs[0].metrics.images == done.metrics.images == TEST_IMAGES - 1
    # If they are evaluated at the end only, what cannot be read of the test images is told then.
    untested = dataclasses.replace(CONFIG, test_every=0)
    epochs, done = run_alone(config, training_phase(0.01, 0.01), small_network(), config=untested)
    assert [epoch.unreadable for epoch in epochs] == [(bad,), ()] and done.unreadable == (bad_test,)
    # One who knows of them from the start tells nothing, and from then on trains the same.
    known, _ = run_alone(config, training_phase(0.01, 0.01, excluded=(bad, bad_test)), small_network())
    assert [epoch.unreadable for epoch in known] == [(), ()]
    assert torch.equal(known[1].tensors["0.weight"], epochs[1].tensors["0.weight"])


@pytest.mark.parametrize("position", [0, 5, 10])
def test_a_batch_of_which_nothing_can_be_read_is_an_error_that_names_the_epoch(tmp_path, position):
    config = dataclasses.replace(folder_config(make_folder(tmp_path)), max_unreadable=TRAIN_IMAGES)
    lost = epoch_batches(TRAIN_IMAGES, batch_size=2, seed=3, epoch=0)[position]
    data = opened(config, batch_size=2)
    try:
        files = sorted((tmp_path / "train").glob("*/*.png"))
        for index in lost:
            files[index].write_bytes(b"junk")
        with pytest.raises(TrainingError, match="epoch 7: not one image of a batch of 2 could be read"):
            train(small_network(), data, training_phase(0.01), config=dataclasses.replace(CONFIG, batch_size=2))
    finally:
        data.close()


def test_no_test_image_that_can_be_read_is_an_error(tmp_path):
    make_folder(tmp_path)
    for path in (tmp_path / "val").glob("*/*.png"):
        path.write_bytes(b"junk")
    data = opened(folder_config(tmp_path))
    try:
        with pytest.raises(TrainingError, match="not one test image could be read"):
            evaluate(small_network(), data)
    finally:
        data.close()


def test_a_compiled_network_trains_to_the_same_weights():
    config = dataclasses.replace(DECAYING, compile=True)
    (epoch,), done = train(linear(ROWS), TWO, training_phase(0.5), config=config)
    (plain,), expected = train(linear(ROWS), TWO, training_phase(0.5), config=DECAYING)
    torch.testing.assert_close(epoch.tensors["weight"], plain.tensors["weight"], rtol=0, atol=1e-6)
    assert epoch.tensors.keys() == plain.tensors.keys()
    assert done.metrics.loss == pytest.approx(expected.metrics.loss, abs=1e-6)
