"""A criterion of the user's own that looks at data: its scores by hand, and how bad ones are refused."""

import own_criteria
import pytest
import torch
from torch import nn

from laasp_ray import criteria
from laasp_ray.config import LaaspConfig
from laasp_ray.errors import ConfigError, SearchError
from laasp_ray.search import rank
from laasp_ray.search.activations import ImportanceRequest, check_request, importance
from laasp_ray.search.evaluate import CalibrationSet

EXAMPLE = torch.zeros(1, 1, 1, 2)
# Two images of one channel and two places; a third and a fourth that are the first two, negated.
IMAGES = torch.tensor([[1.0, 3.0], [-2.0, 0.0], [-1.0, -3.0], [2.0, 0.0]]).reshape(4, 1, 1, 2)
LABELS = torch.tensor([0, 1, 0, 1])


def network(inplace=False):
    """Filters of the first layer: x, -3x and 2x; of the second: the sum of their positive parts, and twice the first.

    Mean |x| over places is 2, 1, 2 and 1 in the four images, so the first layer's mean outputs are 1.5, 4.5 and 3.
    """
    model = nn.Sequential(
        nn.Conv2d(1, 3, 1, bias=False),
        nn.ReLU(inplace),
        nn.Conv2d(3, 2, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 2),
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -3.0, 2.0]).reshape(3, 1, 1, 1))
        model[2].weight.copy_(torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0]]).reshape(2, 3, 1, 1))
    return model.eval()


def request(name, layers=("0", "2"), **options):
    return ImportanceRequest.of(layers, f"own_criteria:{name}", LaaspConfig(flops_reduction=0.5, **options))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
@pytest.mark.parametrize("inplace", [False, True])
def test_scores_by_hand_whatever_the_chunks(batch_size, inplace):
    # Second layer: of x > 0 it gives 3x and 2x, of x < 0 3|x| and 0. Positive x sum to 1 + 3 + 2 over all 8 places,
    # |x| to 12: 36 / 8 and 12 / 8.
    found = importance(network(inplace), CalibrationSet(IMAGES, LABELS, batch_size), request("MeanActivation"))
    assert {layer: values.tolist() for layer, values in found.items()} == {"0": [1.5, 4.5, 3.0], "2": [4.5, 1.5]}


def test_a_ranking_has_it_in_its_pool():
    names = ("l1", "own_criteria:MeanActivation")
    model = network()
    with torch.no_grad():
        model[0].bias = nn.Parameter(torch.tensor([9.0, 0.0, 0.0]))  # of the smallest weight, and the largest output
    ranking = rank(model, IMAGES, LABELS, criteria=names, step=0.05)
    picks = {(entry.layer, entry.criterion): entry.filters for entry in ranking}
    # Outputs of the first layer: 9 + x, of mean 9, and as before; in the second twice the first of it is the greatest.
    assert picks["0", "l1"] == (0,) and picks["0", names[1]] == (2,)
    assert picks["2", "l1"] == (1,)
    also = {(entry.layer, entry.criterion): entry.candidate.also for entry in ranking}
    # |(9 + x)+ + (-3x)+ + (2x)+| has mean 9 + 3 * 6/8 + 2 * 6/8 = 12.75 of the one, 18 of the other.
    assert picks["2", names[1]] == (0,) and also["2", names[1]] == ()


def test_a_class_takes_the_options_it_names_and_an_object_is_taken_as_it_is():
    calibration = CalibrationSet(IMAGES, LABELS, 4)
    # Signed outputs of -3x: the largest of each image are -3, 6, 9, 0; the means -6, 3, 6, -3.
    scores = {name: importance(network(), calibration, request(*name)) for name in (("Scaled",), ("INSTANCE",))}
    assert all(found["0"][1] == 3.0 for found in scores.values())
    found = importance(network(), calibration, request("Scaled", pooling="avg"))
    assert found["0"][1] == 0.0
    assert request("INSTANCE", pooling="avg").criterion is own_criteria.INSTANCE


def test_what_the_network_does_in_place_behind_a_linear_layer_is_not_seen():
    def scores(inplace):
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(inplace), nn.Linear(2, 2)).eval()
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        calibration = CalibrationSet(IMAGES.flatten(1), LABELS, 4)
        return importance(model, calibration, request("Scaled", ("0",)))["0"].tolist()

    assert scores(False) == scores(True) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("WrongScores", ConfigError, r"must give a tensor of shape \(3,\) for layer 0, gave \(3, 1\)"),
        ("OneLayer", ConfigError, r"must give a tensor of shape \(2,\) for layer 2, gave NoneType"),
        ("NoMapping", ConfigError, r"must give scores by layer, a mapping, gave a Tensor"),
        ("NotANumber", SearchError, r"gives NaN for filters \[0, 1, 2\] of layer 0"),
        (
            "WrongFeatures",
            ConfigError,
            r"must give features of shape \(2, 3, any\) for .* \(2, 3, 1, 2\) of layer 0, gave \(2, 3, 1, 2\)",
        ),
        ("InfiniteFeatures", SearchError, "gives features that are not finite for finite outputs of layer 0"),
        ("FailsInFeatures", ConfigError, "failed in features: KeyError: 'mine'"),
        ("FailsInMerge", ConfigError, "failed in merge: KeyError: 'mine'"),
        ("Forgets", ConfigError, "gives None in accumulate, must give its state"),
        ("TooMany", ConfigError, r"failed in check: ValueError: \{'0': \(3, 1\), '2': \(2, 1\)\}"),
    ],
)
def test_a_bad_one_is_refused_in_a_sentence_that_names_it(name, error, message):
    with pytest.raises(error, match=f"^criterion 'own_criteria:{name}' {message}"):
        importance(network(), CalibrationSet(IMAGES, LABELS, 2), request(name))


def test_it_is_tried_on_noise_on_one_layer():
    model = network().train()
    check_request(model, EXAMPLE, request("MeanActivation"))
    assert model.training
    check_request(model, EXAMPLE, request("OneLayer"))
    with pytest.raises(ConfigError, match=r"tried on layer 0: criterion 'own_criteria:NotANumber' gives NaN"):
        check_request(model, EXAMPLE, request("NotANumber"))
    with pytest.raises(ConfigError, match=r"tried on layer 0: criterion 'own_criteria:FailsInMerge' failed in merge"):
        check_request(model, EXAMPLE, request("FailsInMerge"))
    with pytest.raises(ConfigError, match=r"^criterion 'own_criteria:TooMany' failed in check.*'2'"):
        check_request(model, EXAMPLE, request("TooMany"))


def test_noise_that_tells_the_criterion_nothing_is_not_held_against_it():
    model = network()
    with torch.no_grad():
        model[0].weight.zero_()
    wanted = ImportanceRequest.of(("0", "2"), "pls", LaaspConfig(flops_reduction=0.5))
    with pytest.raises(SearchError, match="tells their classes apart"):
        importance(model, CalibrationSet(IMAGES, LABELS, 2), wanted)
    check_request(model, EXAMPLE, wanted)


def test_which_kind_a_criterion_is_of():
    assert [criteria.looks_at_data(name) for name in ("l1", "pls", "own_criteria:MeanActivation")] == [0, 1, 1]
    assert criteria.looks_at_data("own_criteria:INSTANCE")
    with pytest.raises(ConfigError, match="'l1' scores weights, not activations"):
        criteria.data_criterion("l1", pooling="max")
    with pytest.raises(ConfigError, match="'own_criteria:MeanActivation' scores activations, not weights"):
        criteria.scores("own_criteria:MeanActivation", torch.ones(2, 2))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Unfinished", "is a class without accumulate, merge, scores: one that looks at data is a subclass of"),
        ("Needing", "cannot be made of the options components, pooling: TypeError: .*'something'"),
        ("Missing", "cannot be imported"),
    ],
)
def test_what_is_no_criterion_of_data(name, message):
    with pytest.raises(ConfigError, match=f"^criterion 'own_criteria:{name}' {message}"):
        request(name)


def test_a_registered_class_is_found_by_its_name():
    criteria.register("mean_activation")(own_criteria.MeanActivation)
    try:
        assert criteria.known()[-2:] == ("pls", "mean_activation")
        assert isinstance(criteria.data_criterion("mean_activation"), own_criteria.MeanActivation)
    finally:
        criteria.CRITERIA.pop("mean_activation")
    with pytest.raises(ConfigError, match="'mine' is a class without"):
        criteria.register("mine")(own_criteria.Unfinished)
