"""Networks drawn at random: joins, groups, shares, gates, transposed convolutions, norms, shuffles."""

import random

import torch
from torch import nn
from torch.nn import functional

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Shuffle(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.groups = groups

    def forward(self, x):
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class ChannelsLast(nn.Module):
    """LayerNorm over the channels of a map."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Gate(nn.Module):
    """One channel, or one value a channel, between 0 and 1, times the map."""

    def __init__(self, width, whole):
        super().__init__()
        self.whole = whole
        self.squeeze = nn.Conv2d(width, 1 if whole else 3, 1)
        self.expand = None if whole else nn.Conv2d(3, width, 1)

    def forward(self, x):
        if self.whole:
            return x * self.squeeze(x).sigmoid()
        return x * self.expand(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class L2(nn.Module):
    def forward(self, x):
        return functional.normalize(x, dim=1)


class RandomNetwork(nn.Module):
    """A list of steps, each of which makes one more map from maps before it; all maps are 8 x 8."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        draw = self.draw = random.Random(seed)
        self.steps, self.layers = [], nn.ModuleList()
        self.widths = [3]
        self._add("layer", [0], 8, nn.Conv2d(3, 8, 3, padding=1))
        for _ in range(draw.randint(4, 9)):
            getattr(self, f"_{draw.choice(KINDS)}")()
        self.head_kind = draw.choice(["mean", "flat", "two"])
        width = self.widths[-1]
        if self.head_kind == "mean":
            self.head = nn.Linear(width, 5)
        elif self.head_kind == "flat":
            self.head = nn.Linear(width * 4, 5)
        else:
            self.other = draw.randrange(1, len(self.widths))
            self.head = nn.Linear((width + self.widths[self.other]) * 4, 5)

    def _add(self, kind, reads, width, layer=None):
        if layer is not None:
            self.layers.append(layer)
        self.steps.append((kind, tuple(reads), len(self.layers) - 1 if layer is not None else None))
        self.widths.append(width)

    def _pick(self):
        return self.draw.choice([len(self.widths) - 1, self.draw.randrange(1, len(self.widths))])

    def _conv(self):
        read, width = self._pick(), self.draw.choice([4, 6, 8, 12])
        kernel = self.draw.choice([1, 3])
        self._add("layer", [read], width, nn.Conv2d(self.widths[read], width, kernel, padding=kernel // 2))

    def _grouped(self):
        read = self._pick()
        groups = self.draw.choice([g for g in (1, 2, 4) if self.widths[read] % g == 0])
        width = groups * self.draw.choice([2, 3])
        self._add("layer", [read], width, nn.Conv2d(self.widths[read], width, 1, groups=groups))

    def _depthwise(self):
        read = self._pick()
        width = self.widths[read] * self.draw.choice([1, 1, 2])
        self._add("layer", [read], width, nn.Conv2d(self.widths[read], width, 3, padding=1, groups=self.widths[read]))

    def _transposed(self):
        read, width = self._pick(), self.draw.choice([4, 6])
        self._add("layer", [read], width, nn.ConvTranspose2d(self.widths[read], width, 3, padding=1))

    def _norm(self):
        read = self._pick()
        width = self.widths[read]
        groups = self.draw.choice([g for g in (1, 2, 4) if width % g == 0])
        layer = self.draw.choice(
            [nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.GroupNorm(groups, width), ChannelsLast(width), L2()]
        )
        self._add("layer", [read], width, layer)

    def _relu(self):
        read = self._pick()
        self._add("layer", [read], self.widths[read], self.draw.choice([nn.ReLU(), nn.GELU(), nn.Sigmoid()]))

    def _gate(self):
        read = self._pick()
        self._add("layer", [read], self.widths[read], Gate(self.widths[read], self.draw.random() < 0.5))

    def _shuffle(self):
        read = self._pick()
        if self.widths[read] % 2 == 0:
            self._add("layer", [read], self.widths[read], Shuffle(2))

    def _share(self):
        convs = [step for step in self.steps if step[2] is not None and isinstance(self.layers[step[2]], nn.Conv2d)]
        _, _, index = self.draw.choice(convs)
        layer = self.layers[index]
        fitting = [r for r in range(1, len(self.widths)) if self.widths[r] == layer.in_channels]
        if fitting:
            self.steps.append(("layer", (self.draw.choice(fitting),), index))
            self.widths.append(layer.out_channels)

    def _sum(self):
        read = self._pick()
        same = [other for other in range(1, len(self.widths)) if self.widths[other] == self.widths[read]]
        self._add("sum", [read, self.draw.choice(same)], self.widths[read])

    def _join(self):
        reads = [self._pick() for _ in range(self.draw.choice([2, 2, 3]))]
        if sum(self.widths[read] for read in reads) <= 32:
            self._add("join", reads, sum(self.widths[read] for read in reads))

    def _halves(self):
        read = self._pick()
        if self.widths[read] % 2 == 0 and self.widths[read] > 4:
            self._add("halves", [read], self.widths[read] // 2)

    def _partial(self):
        first, second = self._pick(), self._pick()
        if self.widths[first] > self.widths[second]:
            self._add("partial", [first, second], self.widths[first])

    def forward(self, x):
        maps = [x]
        for kind, reads, index in self.steps:
            given = [maps[read] for read in reads]
            if kind == "layer":
                made = self.layers[index](given[0])
            elif kind == "sum":
                made = given[0] + given[1]
            elif kind == "join":
                made = torch.cat(given, 1)
            elif kind == "halves":
                first, second = given[0].chunk(2, 1)
                made = first * second.sigmoid()
            else:
                width = given[1].shape[1]
                made = torch.cat([given[0][:, :width] + given[1], given[0][:, width:]], 1)
            maps.append(made)
        if self.head_kind == "mean":
            return self.head(maps[-1].mean((2, 3)))
        last = [maps[-1]] if self.head_kind == "flat" else [maps[-1], maps[self.other]]
        return self.head(torch.cat([torch.flatten(functional.adaptive_avg_pool2d(m, 2), 1) for m in last], 1))


KINDS = [
    *["conv"] * 4,
    *["norm"] * 3,
    *["relu"] * 2,
    *["sum"] * 2,
    *["join"] * 2,
    *["grouped", "depthwise", "transposed", "gate", "shuffle", "share", "halves", "partial"],
]
