"""A whole run by PLS on Ray, against the one in this process."""

import dataclasses

import pytest
from helpers import small_run, write_digits

from laasp_ray import prune
from laasp_ray.run.events import read_event
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def run(config, *, distributed):
    """The network, the kinds of events, and the decision of the only iteration."""
    result = prune(config, distributed=distributed)
    events = Journal(Storage.open(result.folder)).events()
    (iteration,) = (read_event(event) for event in events if event.name == "iteration")
    return result.model, [event.name for event in events], iteration.decision


def test_a_run_by_pls_decides_what_it_does_in_one_process(session, tmp_path):
    config = small_run(
        tmp_path / "runs",
        data__path=str(write_digits(tmp_path / "digits", side=16, train=48, test=9)),
        data__format="folder",
        model__arguments={"num_classes": 3},
        prune__method="pls",
        prune__iterations=1,
        search__images=48,
        search__batch_size=6,
        # Before the iteration nothing is trained: two workers have other BatchNorm statistics than one.
        train__prune_epoch=0,
        train__epochs=1,
        train__batch_size=24,
        train__drop_epochs=[],
    )
    here, kinds_here, expected = run(dataclasses.replace(config, name="here"), distributed=False)
    there, kinds_there, found = run(dataclasses.replace(config, name="there"), distributed=True)
    # Of the 3 x (16 + 32 + 64) filters inside the blocks a tenth goes, of several layers at once.
    assert sum(len(part.filters) for part in expected.prunes) == 34 and len(expected.further) > 0
    assert found.prunes == expected.prunes
    assert found.flops_reduction == expected.flops_reduction > 0
    assert (found.loss, found.loss_before) == (
        pytest.approx(expected.loss, abs=1e-5),
        pytest.approx(expected.loss_before, abs=1e-5),
    )
    assert (
        kinds_there
        == kinds_here
        == ["start", "baseline", "calibration", "iteration", *["epoch", "training_phase"] * 2, "finish"]
    )
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (here, there)]
    assert shapes[0] == shapes[1]
