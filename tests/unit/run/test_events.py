"""Events as JSON and back, and what of a journal cannot be read."""

import json
import math

import pytest
from run_events import decision, iteration_done, metrics, phase_done, run_started

from laasp_ray.cost.latency import Latency
from laasp_ray.errors import StoreError
from laasp_ray.records import LayerPrune
from laasp_ray.run import events
from laasp_ray.run.events import data_of, event_from, last_of, read_events
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage

LATENCY = Latency(1.5, (1.0, 2.0), batch_size=1, device="cpu", threads=2, repeats=10)
FURTHER = (LayerPrune(layer="b", criterion="l1", filters=(1, 2)), LayerPrune(layer="c", criterion="pls", filters=(0,)))


@pytest.mark.parametrize(
    "event",
    [
        run_started(config={"name": "x", "prune": {"step": 0.1}}, plan={"version": 1}),
        iteration_done(decision(also=(("b", "l2"),), further=FURTHER), latency=(LATENCY, LATENCY), step={"version": 1}),
        iteration_done(decision(loss=math.inf), reached={"parameters": 0.25}),
        events.IterationDone(
            iteration=2, seconds={"total": 1.0}, ends_pruning=True, details={"group": 8}, text="stage"
        ),
        phase_done("final", metrics=metrics(0.75)),
        events.ImageExcluded(image="x.jpg", reason="broken", split="train", index=3, label=1),
        events.Exhausted(reason="nothing left"),
        events.CalibrationDrawn(images=4, digest="0", excluded=("x.jpg",)),
    ],
)
def test_an_event_survives_json(event):
    assert event_from(event.NAME, json.loads(json.dumps(data_of(event)))) == event


def test_a_decision_of_several_layers_tells_them_in_order():
    prunes = decision(layer="a", criterion="pls", filters=(0,), further=FURTHER).prunes
    assert [(prune.layer, prune.criterion) for prune in prunes] == [("a", "pls"), ("b", "l1"), ("c", "pls")]


def test_what_an_older_event_lacks_has_its_default_and_what_it_has_besides_is_passed_over():
    data = data_of(iteration_done())
    del data["reached"]
    assert event_from("iteration", data | {"unknown": 1}) == iteration_done()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"seconds": None}, r"seconds is None"),
        ({"decision": {"iteration": 1}}, r"it lacks 'decision\.layer'"),
        ({"decision": data_of(iteration_done())["decision"] | {"further": [{"layer": "b"}]}}, r"further\.0\.criterion"),
    ],
)
def test_a_damaged_event_is_told_with_its_file_and_the_key(tmp_path, change, fault):
    journal = Journal(Storage.open(str(tmp_path)))
    journal.append("iteration", data_of(iteration_done()) | change)
    with pytest.raises(StoreError, match=rf"journal/000001-iteration\.json in .* is damaged: .*{fault}.*restore it"):
        read_events(journal)


def test_an_event_of_another_version_is_told(tmp_path):
    journal = Journal(Storage.open(str(tmp_path)))
    journal.append("turn", {})
    with pytest.raises(StoreError, match=r"000001-turn\.json in .* is no event that this version knows"):
        read_events(journal)


def test_the_last_event_of_a_kind():
    happened = [phase_done("train"), iteration_done(), phase_done("final")]
    assert last_of(happened, events.TrainingPhaseDone).phase == "final"
    assert last_of(happened, events.RunFinished) is None
