"""The Ray executor and trainer against the in-process ones."""

import dataclasses
import math
import os
import time
from contextlib import closing

import interruptions
import pytest
import ray
import torch
from helpers import first_standing, images_of, randomise_batchnorm, small_run

from laasp_ray import models
from laasp_ray.config import ClusterConfig
from laasp_ray.data.calibration import draw_calibration_images
from laasp_ray.data.loaders.decoding import normalise
from laasp_ray.data.sources.registry import open_source
from laasp_ray.distributed.cluster import plan_resources
from laasp_ray.distributed.executor import RayExecutor
from laasp_ray.distributed.trainer import RayTrainer, put_network
from laasp_ray.errors import ConfigError, DataError, TrainingError
from laasp_ray.methods.laasp import Laasp
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan
from laasp_ray.search.evaluate import CalibrationSet, LossTask
from laasp_ray.search.executor import InProcessExecutor
from laasp_ray.train.loop import EpochPlan, TrainingPhase

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("runs"), prune__criteria=["l1", "l2", "euclidean", "cosine"])


@pytest.fixture(scope="module")
def network(config):
    torch.manual_seed(0)
    return randomise_batchnorm(models.build(config.model)).eval()


@pytest.fixture(scope="module")
def share(session, config):
    return plan_resources(ray.cluster_resources(), config.cluster)


@pytest.fixture(scope="module")
def reference(network):
    return put_network(network)


@pytest.fixture(scope="module")
def calibration(config):
    return draw_calibration_images(open_source(config.data, "train"), config.data, images=300, seed=0)


@pytest.fixture
def executor(config, network, reference, share, calibration):
    with closing(RayExecutor(reference, network, calibration, config, share)) as made:
        yield made


def iteration_by(who, config, network):
    """One iteration of `who`, and what was heard of it: (done, total, layer or None)."""
    heard = []

    def hear(done, total, entry):
        heard.append((done, total, entry and entry.layer))

    example = torch.zeros(1, *config.model.input_shape)
    return Laasp().iterate(first_standing(network, example, config.prune, who, hear)), heard


def serial_of(config, network, calibration):
    pictures = CalibrationSet(
        calibration.images, calibration.labels, config.search.batch_size, lambda batch: normalise(batch, config.data)
    )
    return InProcessExecutor(network, pictures, torch.device("cpu"), config.search, config.seed)


@pytest.fixture(scope="module", params=["on", "off"])
def serial_iteration(request, config, network, calibration):
    """What the spread search is compared with, once for racing on and off."""
    search = dataclasses.replace(config.search, racing=request.param, batch_size=120)
    config = dataclasses.replace(config, search=search)
    iteration, heard = iteration_by(serial_of(config, network, calibration), config, network)
    return config, iteration, heard


@pytest.mark.parametrize(
    "candidates_per_task", [0, *(pytest.param(size, marks=pytest.mark.exhaustive) for size in (1, 3))]
)
def test_the_spread_search_gives_the_serial_losses_and_choice(
    serial_iteration, network, reference, share, calibration, candidates_per_task
):
    config, serial, heard_serial = serial_iteration
    search = dataclasses.replace(config.search, candidates_per_task=candidates_per_task)
    settings = dataclasses.replace(config, search=search)
    with closing(RayExecutor(reference, network, calibration, settings, share)) as executor:
        spread, heard_spread = iteration_by(executor, config, network)
    assert (serial.decision.layer, serial.decision.filters) == (spread.decision.layer, spread.decision.filters)
    entries = [{(entry.layer, entry.filters): entry for entry in iteration.ranking} for iteration in (serial, spread)]
    assert len(serial.ranking) == len(entries[0]) > 30
    assert entries[0].keys() == entries[1].keys()
    for key, entry in entries[0].items():
        other = entries[1][key]
        assert math.isclose(entry.loss, other.loss, rel_tol=0, abs_tol=1e-6), key
        assert (entry.images, entry.dropped_at, entry.error) == (other.images, other.dropped_at, ""), key
    dropped = sum(entry.dropped_at is not None for entry in serial.ranking)
    assert dropped > 10 if config.search.racing == "on" else dropped == 0
    # Every candidate was heard of once by each, and the count went up to the total.
    for heard in (heard_serial, heard_spread):
        counts = [done for done, _, _ in heard]
        assert counts == sorted(counts)
        assert {total for _, total, _ in heard} == {counts[-1]} == {len(serial.ranking)}
        assert sum(layer is not None for _, _, layer in heard) == len(serial.ranking)


def test_the_weights_are_put_into_the_object_store_once_an_iteration(network, executor, monkeypatch):
    """Two measurements on one network, as an iteration with several prunes has, and one on the next network."""
    puts = []
    put = ray.put
    monkeypatch.setattr(ray, "put", lambda value: puts.append(value) or put(value))
    tasks = [LossTask(f"copy {number}", Plan.empty()) for number in range(5)]
    first, second = capture(network, Plan.empty()), capture(network, Plan.empty())
    for state in (first, first, second):
        executor.measure(state, tasks, lambda *_: None, lambda share: None)
    with_weights = [any(isinstance(part, dict) for part in value) for value in puts]
    assert with_weights == [True, False, False, True, False]


def test_a_candidate_that_fails_says_why_and_does_not_stop_the_others(network, executor):
    broken = Plan(tensors={"conv1.weight": {0: ((0, 99),)}})
    tasks = [LossTask("the broken one", broken), LossTask("as it stands", Plan.empty(), {})]
    results = executor.measure(capture(network, Plan.empty()), tasks, lambda *_: None, lambda share: None)
    assert math.isnan(results[0].loss)
    assert results[0].error.startswith("PruningError: ")
    assert results[1].error == ""
    assert math.isfinite(results[1].loss)


@pytest.mark.exhaustive
def test_a_worker_lost_in_the_middle_of_a_search_costs_nothing_but_time(config, network, share, calibration, reference):
    search = dataclasses.replace(config.search, racing="off", candidates_per_task=1)
    spread = RayExecutor(reference, network, calibration, dataclasses.replace(config, search=search), share)
    tasks = [LossTask(f"copy {number}", Plan.empty()) for number in range(60)]
    killed = []

    def kill_one_worker(position, result):
        if len(killed) < 2:
            killed.append(_kill_a_task_worker())

    with closing(spread):
        results = spread.measure(capture(network, Plan.empty()), tasks, kill_one_worker, lambda share: None)
    assert len(killed) == 2
    assert len(results) == 60
    assert len({result.loss for result in results}) == 1


def _kill_a_task_worker():
    """SIGKILL to one process of the search that is at work."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if interruptions.kill_one(os.getpid(), "ray::SearchWorker.run"):
            return True
        time.sleep(0.002)
    raise AssertionError("no search worker is at work")


def training_phase(number, epochs, **more):
    plans = tuple(EpochPlan(epoch=epoch, data_epoch=epoch, learning_rate=0.05) for epoch in range(epochs))
    return TrainingPhase(number=number, phase="train", epochs=plans, **more)


@pytest.mark.exhaustive
def test_a_killed_trainer_costs_nothing_but_time_and_a_further_training_phase_is_cheap(
    config, network, share, tmp_path
):
    trainer = RayTrainer(put_network(network), config, share, str(tmp_path), images_of(config))
    state = capture(network, Plan.empty())
    try:
        undisturbed, done = [], []
        before = trainer.run(state, {}, training_phase(0, 3), undisturbed.append)

        def kill_after_the_first(epoch):
            done.append(epoch)
            if len(done) == 1:
                assert interruptions.kill_one(os.getpid(), "RayTrainWorker")

        after = trainer.run(state, {}, training_phase(1, 3), kill_after_the_first)
        assert [epoch.position for epoch in done] == [epoch.position for epoch in undisturbed] == [0, 1, 2]
        assert after.metrics == before.metrics
        for name, tensor in undisturbed[-1].tensors.items():
            assert torch.equal(tensor, done[-1].tensors[name]), name
        assert before.metrics.images == len(open_source(config.data, "test"))
        # Every training image was seen once an epoch, whatever the ranks.
        assert {epoch.images for epoch in undisturbed} == {len(open_source(config.data, "train"))}
        # Nor does the loss of the whole group's mailbox.
        again = []

        def kill_the_mailbox_after_the_first(epoch):
            again.append(epoch)
            if len(again) == 1:
                assert interruptions.kill_one(os.getpid(), "ray::Mailbox")

        trainer.run(state, {}, training_phase(2, 3), kill_the_mailbox_after_the_first)
        assert [epoch.position for epoch in again] == [0, 1, 2]
        for name, tensor in undisturbed[-1].tensors.items():
            assert torch.equal(tensor, again[-1].tensors[name]), name
        # Going on in the middle of a training phase is the same training phase.
        resumed = []
        middle = undisturbed[0]
        trainer.run(
            dataclasses.replace(state, tensors=middle.tensors),
            middle.optimizer_state,
            training_phase(3, 3, done=1),
            resumed.append,
        )
        assert [epoch.position for epoch in resumed] == [1, 2]
        for name, tensor in undisturbed[-1].tensors.items():
            assert torch.equal(tensor, resumed[-1].tensors[name]), name
    finally:
        trainer.close()


@pytest.mark.exhaustive
def test_a_killed_trainer_loses_neither_its_average_nor_its_teacher(config, network, share, tmp_path):
    options = dataclasses.replace(config.train, label_smoothing=0.1, ema=0.9, distill=0.5)
    trainer = RayTrainer(
        put_network(network), dataclasses.replace(config, train=options), share, str(tmp_path), images_of(config)
    )
    state = capture(network, Plan.empty())
    torch.manual_seed(1)
    teacher = capture(randomise_batchnorm(models.build(config.model), seed=1), Plan.empty())
    try:
        untaught, undisturbed, done, again = [], [], [], []
        trainer.run(state, {}, training_phase(0, 1), untaught.append)
        trainer.set_teacher(teacher)
        before = trainer.run(state, {}, training_phase(1, 3), undisturbed.append)
        assert not torch.equal(untaught[0].tensors["conv1.weight"], undisturbed[0].tensors["conv1.weight"])

        def kill(name, seen):
            """Kills when the first epoch is heard of: what is resumed is in the middle of its training phase."""

            def hear(epoch):
                seen.append(epoch)
                if len(seen) == 1:
                    assert interruptions.kill_one(os.getpid(), name)

            return hear

        for who, seen in (("RayTrainWorker", done), ("ray::Mailbox", again)):
            after = trainer.run(state, {}, training_phase(2, 3), kill(who, seen))
            assert [epoch.position for epoch in seen] == [0, 1, 2] and after.metrics == before.metrics
            # The averages of the first two epochs were tested, by all ranks.
            assert [epoch.metrics for epoch in seen] == [epoch.metrics for epoch in undisturbed]
            assert [epoch.metrics and epoch.metrics.images for epoch in seen] == [before.metrics.images] * 2 + [None]
            for name, tensor in undisturbed[-1].tensors.items():
                assert torch.equal(tensor, seen[-1].tensors[name]), (who, name)
            for name, tensor in undisturbed[-1].optimizer_state.items():
                assert torch.equal(tensor, seen[-1].optimizer_state[name]), (who, name)
        assert not torch.equal(done[-1].tensors["conv1.weight"], done[-1].optimizer_state["weights/conv1.weight"])
    finally:
        trainer.close()


def test_a_phase_goes_on_from_its_middle_and_an_error_in_training_reaches_the_driver_as_what_it_is(
    config, network, share, tmp_path
):
    """Two things of one trainer, for it takes long to start; the tests of kills have more of the first."""
    options = dataclasses.replace(config.train, label_smoothing=0.1, ema=0.9, distill=0.5)
    trainer = RayTrainer(
        put_network(network), dataclasses.replace(config, train=options), share, str(tmp_path), images_of(config)
    )
    state = capture(network, Plan.empty())
    torch.manual_seed(1)
    teacher = capture(randomise_batchnorm(models.build(config.model), seed=1), Plan.empty())
    broken = randomise_batchnorm(models.build(config.model))
    with torch.no_grad():
        broken.conv1.weight[0, 0, 0, 0] = math.nan
    try:
        untaught, undisturbed, resumed = [], [], []
        trainer.run(state, {}, training_phase(0, 1), untaught.append)
        trainer.set_teacher(teacher)
        whole = trainer.run(state, {}, training_phase(1, 2), undisturbed.append)
        assert not torch.equal(untaught[0].tensors["conv1.weight"], undisturbed[0].tensors["conv1.weight"])
        # Every training image was seen once an epoch, whatever the ranks, and every test image after it.
        assert {epoch.images for epoch in undisturbed} == {len(open_source(config.data, "train"))}
        assert undisturbed[0].metrics.images == whole.metrics.images == len(open_source(config.data, "test"))
        middle = undisturbed[0]
        going_on = dataclasses.replace(state, tensors=middle.tensors)
        after = trainer.run(going_on, middle.optimizer_state, training_phase(2, 2, done=1), resumed.append)
        assert [epoch.position for epoch in resumed] == [1] and after.metrics == whole.metrics
        for name, tensor in undisturbed[-1].tensors.items():
            assert torch.equal(tensor, resumed[-1].tensors[name]), name
        with pytest.raises(TrainingError, match=r"epoch 0 .*not finite"):
            trainer.run(capture(broken, Plan.empty()), {}, training_phase(3, 1), lambda epoch: None)
    finally:
        trainer.close()


def test_an_error_that_keeps_coming_ends_the_training_phase_with_what_it_said(config, network, share, tmp_path):
    impatient = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, worker_failures=0))
    trainer = RayTrainer(put_network(network), impatient, share, str(tmp_path), images_of(config))
    state = capture(network, Plan.empty())
    unknown = dataclasses.replace(training_phase(0, 1), epochs=("no epoch's plan",))
    try:
        with pytest.raises(TrainingError, match=r"lost once without finishing an epoch.*AttributeError"):
            trainer.run(state, {}, unknown, lambda epoch: None)
    finally:
        trainer.close()


def test_a_lone_worker_that_has_other_images_than_the_driver_is_named(session, config, network, tmp_path):
    """A rank that is alone has no other to compare with: it trained on what it found."""
    share = plan_resources(ray.cluster_resources(), dataclasses.replace(config.cluster, workers=1))
    train, test = images_of(config)
    trainer = RayTrainer(put_network(network), config, share, str(tmp_path), (train, test[::-1]))
    try:
        with pytest.raises(DataError, match=r"different images: those on \d.* and the driver's differ in names"):
            trainer.run(capture(network, Plan.empty()), {}, training_phase(0, 1), lambda epoch: None)
    finally:
        trainer.close()


def test_more_workers_than_the_cluster_can_hold_are_refused():
    with pytest.raises(ConfigError, match=r"cluster\.workers is 3, but the cluster has 2 CPUs"):
        plan_resources({"CPU": 2.0}, ClusterConfig(workers=3))
    with pytest.raises(ConfigError, match=r"cluster\.workers is 9, but the cluster has 8 GPUs"):
        plan_resources({"CPU": 64.0, "GPU": 8.0}, ClusterConfig(workers=9))


@pytest.mark.parametrize(
    ("resources", "trainers", "tasks"), [({"CPU": 2.0}, 2, 2), ({"CPU": 1.0}, 1, 1), ({"CPU": 16.0, "GPU": 4.0}, 4, 4)]
)
def test_trainers_and_tasks_find_room_beside_each_other(resources, trainers, tasks):
    share = plan_resources(resources, ClusterConfig())
    assert share.workers == trainers
    cpus = trainers * share.trainer_resources["CPU"] + tasks * share.task_options["num_cpus"]
    gpus = trainers * share.trainer_resources.get("GPU", 0) + tasks * share.task_options.get("num_gpus", 0)
    assert cpus <= resources["CPU"]
    assert gpus <= resources.get("GPU", 0) + 1e-9
