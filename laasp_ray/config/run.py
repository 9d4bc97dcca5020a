"""A run, as frozen dataclasses. Shapes and ranges are checked here; an unknown key is an error.

`RunConfig.to_dict` and `from_dict` are inverse to each other; the dictionary is what a run's `config.json` holds.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from laasp_ray.config.compat import with_current_names
from laasp_ray.config.fields import build, check, to_plain
from laasp_ray.config.names import is_import_path

DATA_FORMATS = ("auto", "digits", "folder", "parquet", "cifar_batches", "tar")
"""What `data.format` may be, import paths aside: the layouts of data/sources/registry.py, the digits, or `auto`."""
TrainTransform = Literal["random_resized_crop", "pad_crop"]
LoaderName = Literal["auto", "dali", "torchvision"]
StepRule = Literal["flops_share", "layer_share"]
Method = Literal["laasp", "pls"]
Schedule = Literal["steps", "cosine"]
POOLING = re.compile(r"(max|avg)(?:([1-9]\d*)x([1-9]\d*))?")
"""What `prune.pooling` may be: all of a filter's output at once, or windows of height x width."""
DEFAULT_CRITERIA = ("l1", "l2", "euclidean", "cosine")
TARGETS = {"FLOPs": "flops_reduction", "parameters": "parameters_reduction", "latency": "latency_reduction"}
"""What a target may be of -> its key of `prune`."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The unpruned network: a builder's name (see models/) with its arguments, and the shape of one input (C, H, W)."""

    builder: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    input_shape: tuple[int, int, int] = (3, 224, 224)

    def __post_init__(self) -> None:
        check(
            len(self.input_shape) == 3 and min(self.input_shape) >= 1,
            "model.input_shape",
            self.input_shape,
            "three positive numbers: channels, height, width",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are and what is done to them. `path` None is the embedded set of handwritten digits.

    `format` is a layout's name, or the import path `package.module:name` of a class or function that is called with
    this config and the split and gives an ImageSource (data/sources/base.py); `path` is then what that makes of it.

    Training images: `random_resized_crop` takes a window of `scale` of the area at an aspect `ratio` and resizes it to
    `image_size`; `pad_crop` pads by `pad` pixels of zeros and takes a window of `image_size`. Either flips with
    probability `flip`. Evaluation: the shorter side is resized to `eval_resize` (0: not resized) and the centre of
    `image_size` cropped. `mean` and `std` are for pixels in 0..1.
    """

    path: str | None = None
    format: str = "auto"
    train_transform: TrainTransform = "random_resized_crop"
    image_size: int = 224
    eval_resize: int = 256
    pad: int = 4
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    loader: LoaderName = "auto"
    threads: int = 2
    max_unreadable: int = 20

    def __post_init__(self) -> None:
        known = self.format in DATA_FORMATS or is_import_path(self.format)
        check(known, "data.format", self.format, f"one of {', '.join(map(repr, DATA_FORMATS))}, or an import path")
        check(self.image_size >= 1, "data.image_size", self.image_size, "at least 1")
        check(
            self.eval_resize == 0 or self.eval_resize >= self.image_size,
            "data.eval_resize",
            self.eval_resize,
            f"0 or at least data.image_size ({self.image_size})",
        )
        check(self.pad >= 0, "data.pad", self.pad, "at least 0")
        check(0 < self.scale[0] <= self.scale[1] <= 1, "data.scale", self.scale, "0 < low <= high <= 1")
        check(0 < self.ratio[0] <= self.ratio[1], "data.ratio", self.ratio, "0 < low <= high")
        check(0 <= self.flip <= 1, "data.flip", self.flip, "a probability")
        check(min(self.std) > 0, "data.std", self.std, "positive numbers")
        check(self.threads >= 1, "data.threads", self.threads, "at least 1")
        check(self.max_unreadable >= 0, "data.max_unreadable", self.max_unreadable, "at least 0")


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """What is removed. `flops_reduction` is the target share of the unpruned network's multiply-accumulates;
    `parameters_reduction` and `latency_reduction` are targets for its parameters and its median latency. 0 is no such
    target; pruning ends when all that are given are reached (a run with `sparsity` removes no filters and has none).
    Latency is measured after every prune, at `latency_batch` images, beside the unpruned network's: it is a clock's, so
    such a run is not repeatable, and one lucky measurement ends pruning. It also ends when no filter is left to give.

    `step` is the share of FLOPs that one prune is worth (`step_rule` flops_share), or the share of a layer's current
    filters (layer_share, the VGG rule). `max_pruned` bounds the share of a layer's original filters that may go.
    `ignored` names modules (or prefixes of them, ending in a dot) that are left alone. `extra_layers` names linear
    layers that are candidates too. After each `fine_tune_every` of FLOPs (0: after every prune) `fine_tune_epochs`
    follow. After `iterations` iterations (0: no bound) pruning ends even if the target is not reached. A prune leaves
    a layer with a multiple of `round_to` filters.

    Up to `prunes_per_iteration` candidates of an iteration are carried out together: the best, and the next best whose
    prune changes nothing that another's does. Those that a race dropped do not count, and it drops most:
    `search.racing` off lets them all. A race's bound (`search.racing_error`) holds for the best one only. Method laasp
    only.

    `method` pls removes, every iteration, the `percent` (of 100) of all filters of layers with no others coupled to
    them that tell least of the classes; `step`, `max_pruned` and `criteria` are not its. It and the criterion pls fit
    `components` to the filters' outputs, pooled (`max` or `avg`) whole, or in windows (`max2x2`).
    """

    flops_reduction: float
    method: Method = "laasp"
    iterations: int = 0
    step: float = 0.01
    step_rule: StepRule = "flops_share"
    max_pruned: float = 0.75
    ignored: tuple[str, ...] = ()
    extra_layers: tuple[str, ...] = ()
    criteria: tuple[str, ...] = DEFAULT_CRITERIA
    fine_tune_every: float = 0.02
    fine_tune_epochs: int = 1
    percent: float = 10.0
    components: int = 2
    pooling: str = "max"
    round_to: int = 1
    prunes_per_iteration: int = 1
    parameters_reduction: float = 0.0
    latency_reduction: float = 0.0
    latency_batch: int = 1

    def __post_init__(self) -> None:
        for key in TARGETS.values():
            check(0 <= getattr(self, key) < 1, f"prune.{key}", getattr(self, key), "a share between 0 and 1")
        check(0 < self.step < 1, "prune.step", self.step, "a share between 0 and 1")
        check(0 < self.max_pruned < 1, "prune.max_pruned", self.max_pruned, "a share between 0 and 1")
        check(len(self.criteria) > 0, "prune.criteria", self.criteria, "at least one criterion")
        check(len(set(self.criteria)) == len(self.criteria), "prune.criteria", self.criteria, "each criterion once")
        check(0 <= self.fine_tune_every < 1, "prune.fine_tune_every", self.fine_tune_every, "a share from 0 to below 1")
        check(self.fine_tune_epochs >= 0, "prune.fine_tune_epochs", self.fine_tune_epochs, "at least 0")
        check(self.method in typing.get_args(Method), "prune.method", self.method, "'laasp' or 'pls'")
        check(self.iterations >= 0, "prune.iterations", self.iterations, "at least 0 (0: no bound)")
        check(0 < self.percent < 100, "prune.percent", self.percent, "a percentage between 0 and 100, such as 10")
        check(self.components >= 1, "prune.components", self.components, "at least 1")
        whole = POOLING.fullmatch(self.pooling) is not None
        check(whole, "prune.pooling", self.pooling, "'max' or 'avg', with windows 'max2x2' or 'avg4x4'")
        check(self.round_to >= 1, "prune.round_to", self.round_to, "at least 1 (1: any number of filters)")
        check(self.prunes_per_iteration >= 1, "prune.prunes_per_iteration", self.prunes_per_iteration, "at least 1")
        one = self.prunes_per_iteration == 1 or self.method == "laasp"
        check(
            one,
            "prune.prunes_per_iteration",
            self.prunes_per_iteration,
            "1 with method pls, which prunes many layers at once",
        )
        check(self.latency_batch >= 1, "prune.latency_batch", self.latency_batch, "at least 1")

    @property
    def targets(self) -> dict[str, float]:
        """The targets that are given: what of (a key of TARGETS) -> the share of the unpruned network's to be gone."""
        return {of: getattr(self, key) for of, key in TARGETS.items() if getattr(self, key) > 0}


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """Group sparsity: of every `group` consecutive inputs, `prune` weights of a convolution are zero.

    `fc_prune`: the same for linear layers, one number for all or one for each in network order; none leaves them
    dense. `stages`: the numbers pruned, rising to `prune`, with `prune.fine_tune_epochs` of training after each but the
    last, which the rest of the schedule follows; none is one stage. Linear layers rise in proportion, rounded down.
    `from_run` is the folder of a finished run whose pruned network is begun with.
    """

    group: int = 8
    prune: int = 6
    fc_prune: tuple[int, ...] = ()
    stages: tuple[int, ...] = ()
    from_run: str | None = None

    def __post_init__(self) -> None:
        check(self.group >= 2, "sparsity.group", self.group, "at least 2")
        inside = f"from 1 to below sparsity.group ({self.group})"
        check(0 < self.prune < self.group, "sparsity.prune", self.prune, inside)
        check(all(0 < p < self.group for p in self.fc_prune), "sparsity.fc_prune", self.fc_prune, inside)
        rising = all(a < b for a, b in zip((0, *self.stages), self.stages, strict=False))
        check(
            rising and self.stages[-1:] in ((), (self.prune,)),
            "sparsity.stages",
            self.stages,
            f"rising from at least 1 to sparsity.prune ({self.prune})",
        )

    @property
    def all_stages(self) -> tuple[int, ...]:
        return self.stages or (self.prune,)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How the candidates' losses are measured: on `images` training images (all there are if fewer), drawn once.

    `racing` on drops candidates that are worse with confidence before they have seen all images; `racing_error` is
    the chance that this drops the best. At most `batch_size` images go through the network at a time, and fewer where
    their values would take more than `memory_mb` (0: a share of the memory that is free). `candidates_per_task` bounds
    a Ray task's candidates (0: sized by what they cost). With `reestimate_batchnorm` an iteration scores the network
    with BatchNorm statistics measured anew on these images (search/batchnorm.py); the network itself keeps its own.
    """

    images: int = 5000
    batch_size: int = 250
    racing: Literal["on", "off"] = "on"
    racing_error: float = 0.01
    memory_mb: int = 0
    candidates_per_task: int = 0
    reestimate_batchnorm: bool = False

    def __post_init__(self) -> None:
        check(self.images >= 1, "search.images", self.images, "at least 1")
        check(self.batch_size >= 1, "search.batch_size", self.batch_size, "at least 1")
        check(0 < self.racing_error < 0.5, "search.racing_error", self.racing_error, "a probability below one half")
        check(self.memory_mb >= 0, "search.memory_mb", self.memory_mb, "at least 0")
        check(self.candidates_per_task >= 0, "search.candidates_per_task", self.candidates_per_task, "at least 0")
        enough = self.images >= 2 or not self.reestimate_batchnorm
        check(enough, "search.images", self.images, "at least 2 with search.reestimate_batchnorm: one has no variance")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """SGD's schedule. `prune_epoch` (t_p) splits it: epochs 0..t_p, then pruning, then t_p..epochs.

    The learning rate is `learning_rate` times `drop_factor` for every entry of `drop_epochs` that the epoch has
    reached; with `schedule` cosine it falls from `learning_rate` towards 0 in half a cosine instead. `batch_size` is
    the global batch, over all workers. `pretrained` names a state dict (.safetensors, .pt or .pth) of the network as
    it stands at `prune_epoch`; training up to there is then left out.

    `label_smoothing` is the share of every label that is spread over all classes. With `ema`, a decay, a training phase
    of training gives an exponential moving average of its weights instead of the last ones. After the first prune the
    network is trained by `distill` (a share; 0: not) to give what the unpruned one gives at `distill_temperature`.

    Before and after pruning, but not in fine-tunings, the test images are evaluated after every `test_every` epochs of
    the schedule (0: never), at the end of each training phase in any case. Nothing is decided by it.
    """

    epochs: int
    prune_epoch: int
    learning_rate: float = 0.1
    drop_epochs: tuple[int, ...] = ()
    drop_factor: float = 0.1
    batch_size: int = 256
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    pretrained: str | None = None
    schedule: Schedule = "steps"
    label_smoothing: float = 0.0
    ema: float = 0.0
    distill: float = 0.0
    distill_temperature: float = 4.0
    test_every: int = 1

    def __post_init__(self) -> None:
        check(self.epochs >= 1, "train.epochs", self.epochs, "at least 1")
        check(
            0 <= self.prune_epoch <= self.epochs,
            "train.prune_epoch",
            self.prune_epoch,
            f"from 0 to train.epochs ({self.epochs})",
        )
        check(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "positive")
        check(
            tuple(sorted(self.drop_epochs)) == tuple(self.drop_epochs),
            "train.drop_epochs",
            self.drop_epochs,
            "rising epochs",
        )
        check(self.drop_factor > 0, "train.drop_factor", self.drop_factor, "positive")
        check(self.batch_size >= 2, "train.batch_size", self.batch_size, "at least 2")
        check(0 <= self.momentum < 1, "train.momentum", self.momentum, "from 0 to below 1")
        check(not self.nesterov or self.momentum > 0, "train.nesterov", self.nesterov, "momentum above 0 with it")
        check(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "at least 0")
        check(self.schedule in typing.get_args(Schedule), "train.schedule", self.schedule, "'steps' or 'cosine'")
        for key in ("label_smoothing", "ema", "distill"):
            check(0 <= getattr(self, key) < 1, f"train.{key}", getattr(self, key), "from 0 to below 1")
        check(self.distill_temperature > 0, "train.distill_temperature", self.distill_temperature, "positive")
        check(
            self.test_every >= 0,
            "train.test_every",
            self.test_every,
            "at least 0 (0: at the end of a training phase only)",
        )

    def learning_rate_at(self, epoch: int) -> float:
        """The schedule's learning rate in `epoch` (0-based)."""
        if self.schedule == "cosine":
            return self.learning_rate * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        return self.learning_rate * self.drop_factor ** sum(epoch >= drop for drop in self.drop_epochs)

    def is_tested(self, epoch: int) -> bool:
        """Whether `test_every` asks for an evaluation after `epoch` (0-based) of the schedule."""
        return self.test_every > 0 and (epoch + 1) % self.test_every == 0


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How much of the cluster a run uses. It may change between a run's start and its resumption.

    Another number of workers changes which images share a batch in BatchNorm, and so may change later decisions.

    `workers` trainers (0: one per GPU, or on a cluster without GPUs two, if it has two CPUs). A trainer and an
    evaluation task share each GPU: `trainer_gpu_share` + `task_gpu_share` must be at most 1, and the trainer's share
    above one half, so that no two trainers meet on one GPU. `worker_failures` is how often the trainers may be lost
    without an epoch being finished in between.
    """

    workers: int = 0
    trainer_gpu_share: float = 0.6
    task_gpu_share: float = 0.4
    worker_failures: int = 3

    def __post_init__(self) -> None:
        check(self.workers >= 0, "cluster.workers", self.workers, "at least 0 (0: as many as fit)")
        check(
            0.5 < self.trainer_gpu_share < 1,
            "cluster.trainer_gpu_share",
            self.trainer_gpu_share,
            "above one half and below 1",
        )
        check(
            0 < self.task_gpu_share <= 1 - self.trainer_gpu_share + 1e-9,
            "cluster.task_gpu_share",
            self.task_gpu_share,
            "positive and at most 1 - cluster.trainer_gpu_share",
        )
        check(self.worker_failures >= 0, "cluster.worker_failures", self.worker_failures, "at least 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run. When it is resumed some keys may differ (config/compat.py), nothing else may.

    With `sparsity` the run makes groups sparse instead of removing filters. Without it and without a target (see
    PruneConfig) it prunes nothing: it trains by the whole schedule, or given weights from the prune epoch on.
    """

    name: str
    model: ModelConfig
    data: DataConfig
    prune: PruneConfig
    train: TrainConfig
    search: SearchConfig = field(default_factory=SearchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    sparsity: SparsityConfig | None = None
    storage: str = "runs"
    seed: int = 0

    def __post_init__(self) -> None:
        plain = self.name.replace("-", "").replace("_", "").replace(".", "")
        check(plain.isalnum() and self.name[0].isalnum(), "name", self.name, "letters, digits, '-', '_' and '.'")
        check(
            self.data.image_size == self.model.input_shape[1] == self.model.input_shape[2],
            "data.image_size",
            self.data.image_size,
            f"the height and width of model.input_shape {self.model.input_shape}",
        )
        sparsity = self.sparsity
        if sparsity is None:
            if not self.prunes:
                off = "without a target (prune.flops_reduction and others), when nothing is pruned"
                self._check_unused(off, "prune.iterations", "prune.method", "train.distill")
            return
        for key in TARGETS.values():
            target = getattr(self.prune, key)
            check(target == 0, f"prune.{key}", target, "0 with sparsity, which removes no filters")
        off = "with sparsity, which removes no filters and measures no candidates"
        self._check_unused(off, "prune.method", "prune.iterations", "prune.round_to", "prune.prunes_per_iteration")
        self._check_unused(off, "search.reestimate_batchnorm")
        check(
            len(sparsity.all_stages) == 1 or self.prune.fine_tune_epochs > 0,
            "prune.fine_tune_epochs",
            self.prune.fine_tune_epochs,
            "at least 1 with several sparsity.stages: they are trained in between",
        )
        check(
            sparsity.from_run is None or self.train.pretrained is None,
            "train.pretrained",
            self.train.pretrained,
            "left out with sparsity.from_run, which brings its weights",
        )

    def _check_unused(self, off: str, *keys: str) -> None:
        for key in keys:
            section, name = key.split(".")
            part = getattr(self, section)
            default = getattr(type(part), name)  # a dataclass keeps plain defaults as class attributes
            check(getattr(part, name) == default, key, getattr(part, name), f"left at {default!r} {off}")

    @property
    def prunes(self) -> bool:
        """Whether anything is pruned, filters or weights."""
        return self.sparsity is not None or bool(self.prune.targets)

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> RunConfig:
        """Raises ConfigError for an unknown or missing key or a value of the wrong type, naming it."""
        return build(RunConfig, with_current_names(data) if isinstance(data, Mapping) else data, "")
