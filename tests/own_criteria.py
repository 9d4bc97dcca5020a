"""Criteria of data as a user writes them: one that works, and some that do not."""

import threading

import torch

from laasp_ray.criteria import DataCriterion, pooled


class MeanActivation(DataCriterion):
    """The mean absolute output of each filter, over images and positions."""

    def features(self, output):
        return pooled(output.abs(), "avg")

    def start(self, first):
        return 0, {layer: torch.zeros_like(mean) for layer, mean in first.means.items()}

    def accumulate(self, state, features, labels):
        return state[0] + len(labels), {layer: total + features[layer].sum(dim=0) for layer, total in state[1].items()}

    def merge(self, state, other):
        return state[0] + other[0], {layer: total + other[1][layer] for layer, total in state[1].items()}

    def scores(self, state, shapes):
        return {layer: total.mean(dim=1) / state[0] for layer, total in state[1].items()}


class Scaled(MeanActivation):
    """Takes the option `pooling`."""

    def __init__(self, pooling):
        self.pooling = pooling

    def features(self, output):
        return pooled(output, self.pooling)


class Needing(MeanActivation):
    def __init__(self, something):
        self.something = something


class WrongScores(MeanActivation):
    def scores(self, state, shapes):
        return state[1]


class OneLayer(MeanActivation):
    def scores(self, state, shapes):
        return dict(list(super().scores(state, shapes).items())[:1])


class NoMapping(MeanActivation):
    def scores(self, state, shapes):
        return torch.zeros(2)


class NotANumber(MeanActivation):
    def scores(self, state, shapes):
        return {layer: values * torch.nan for layer, values in super().scores(state, shapes).items()}


class WrongFeatures(MeanActivation):
    def features(self, output):
        return output


class InfiniteFeatures(MeanActivation):
    def features(self, output):
        return pooled(output * 0, "avg").log()


class FailsInFeatures(MeanActivation):
    def features(self, output):
        raise KeyError("mine")


class FailsInMerge(MeanActivation):
    def merge(self, state, other):
        raise KeyError("mine")


class Forgets(MeanActivation):
    def accumulate(self, state, features, labels):
        super().accumulate(state, features, labels)


class TooMany(MeanActivation):
    def check(self, shapes, device):
        raise ValueError(f"{shapes}")


class Unpicklable(MeanActivation):
    def start(self, first):
        return (*super().start(first), threading.Lock())

    def accumulate(self, state, features, labels):
        return (*super().accumulate(state[:2], features, labels), state[2])


class Unfinished(DataCriterion):
    def features(self, output):
        return output

    def start(self, first):
        return 0


INSTANCE = Scaled("max")
