"""The section `train`: the schedule of SGD."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from laasp_ray.config.data import GIVEN
from laasp_ray.config.fields import Doc, check, check_types
from laasp_ray.config.names import is_import_path

Schedule = Literal["steps", "cosine"]
TrainPrecision = Literal["gpu", "auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The schedule of SGD. `prune_epoch` (t_p) splits it: epochs 0..t_p, then pruning, then t_p..epochs.

    The learning rate is `learning_rate` times `drop_factor` for every entry of `drop_epochs` that the epoch has
    reached. With `schedule` cosine it falls from `learning_rate` towards 0 as half a cosine.

    `train.test_every` sets how often the test images are evaluated before and after pruning; it does not apply to
    fine-tunes. They are always evaluated at the end of each training phase. No decision depends on them.
    """

    epochs: Annotated[int, Doc("epochs of the whole schedule, at least 1")]
    prune_epoch: Annotated[int, Doc("the epoch of the schedule at which pruning begins, 0 to epochs")]
    learning_rate: Annotated[float, Doc("the schedule's first learning rate")] = 0.1
    drop_epochs: Annotated[tuple[int, ...], Doc("epochs, rising, at which the learning rate drops")] = ()
    drop_factor: Annotated[float, Doc("what the learning rate is multiplied by at each of drop_epochs")] = 0.1
    batch_size: Annotated[
        int, Doc("global batch, over all workers, at least 2; the learning rate is not scaled with it")
    ] = 256
    batch_per_gpu: Annotated[
        int,
        Doc("images a batch for each worker at the start; the learning rate scales linearly; 0: batch_size"),
    ] = 0
    warmup_epochs: Annotated[
        int, Doc("epochs in which a learning rate that batch_per_gpu scales rises from the unscaled one")
    ] = 5
    momentum: Annotated[float, Doc("SGD's momentum, 0 to below 1")] = 0.9
    nesterov: Annotated[bool, Doc("Nesterov's form of momentum")] = True
    weight_decay: Annotated[float, Doc("SGD's weight decay (L2)")] = 1e-4
    pretrained: Annotated[
        str | None,
        Doc(
            "weights of the network as it stands at the prune epoch, which are trained on from there: a state dict "
            "(.safetensors, .pt, .pth) or torchvision's by name, torchvision:IMAGENET1K_V2"
        ),
    ] = None
    schedule: Annotated[Schedule, Doc("steps: drops at drop_epochs; cosine: towards 0 in half a cosine")] = "steps"
    label_smoothing: Annotated[float, Doc("share of every label that is spread over all classes, 0 to below 1")] = 0.0
    ema: Annotated[
        float, Doc("decay of an average of the weights that a training phase gives instead of the last; 0: off")
    ] = 0.0
    distill: Annotated[
        float, Doc("share of the loss that is to give what the unpruned network gives, after the first prune; 0: off")
    ] = 0.0
    distill_temperature: Annotated[float, Doc("temperature of both networks' outputs in distillation")] = 4.0
    test_every: Annotated[
        int, Doc("epochs between two evaluations on the test images; 0: at the end of a training phase only")
    ] = 1

    precision: Annotated[
        TrainPrecision,
        Doc(
            "of training: bfloat16 on a gpu and float32 on a CPU; auto: bfloat16 also on a CPU that has instructions "
            "for it; or always float32 or bfloat16"
        ),
    ] = "gpu"
    keep_checkpoints: Annotated[
        bool, Doc("keep the last weights of every training phase, not only the run's last two epochs")
    ] = False
    autotune: Annotated[
        bool, Doc("cuDNN tries which kernels are fastest; a resumed run then differs in the last digits")
    ] = False
    compile: Annotated[
        bool,
        Doc("torch.compile for training: minutes at the start of each training phase, and other last digits"),
    ] = False

    loss: Annotated[
        str,
        Doc(
            "import path of a loss of your own, (outputs, targets) or (model, batch) -> one value per example; empty: "
            "cross-entropy"
        ),
    ] = ""
    metrics: Annotated[
        Mapping[str, str], Doc("name -> import path of the metrics that go with train.loss; the first decides")
    ] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self, "train.")
        named = self.loss in ("", GIVEN) or is_import_path(self.loss)
        check(named, "train.loss", self.loss, "an import path, package.module:name")
        for name, path in self.metrics.items():
            right = isinstance(path, str) and is_import_path(path)
            check(right, f"train.metrics.{name}", path, "an import path, package.module:name")
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
        per_gpu = self.batch_per_gpu
        check(per_gpu == 0 or per_gpu >= 2, "train.batch_per_gpu", per_gpu, "at least 2 (0: train.batch_size)")
        check(self.warmup_epochs >= 0, "train.warmup_epochs", self.warmup_epochs, "at least 0")
        check(0 <= self.momentum < 1, "train.momentum", self.momentum, "from 0 to below 1")
        check(not self.nesterov or self.momentum > 0, "train.nesterov", self.nesterov, "momentum above 0 with it")
        check(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "at least 0")
        for key in ("label_smoothing", "ema", "distill"):
            check(0 <= getattr(self, key) < 1, f"train.{key}", getattr(self, key), "from 0 to below 1")
        check(self.distill_temperature > 0, "train.distill_temperature", self.distill_temperature, "positive")
        check(
            self.test_every >= 0,
            "train.test_every",
            self.test_every,
            "at least 0 (0: at the end of a training phase only)",
        )

    def global_batch(self, parts: int) -> int:
        """The images of a step in a run whose global batch has `parts` parts."""
        return self.batch_per_gpu * parts or self.batch_size

    def learning_rate_at(self, epoch: int, parts: int = 1) -> float:
        """The learning rate of the schedule in `epoch` (0-based), for a global batch of `parts` parts.

        With `batch_per_gpu` it is scaled by the global batch over `batch_size`, after a linear rise from 1 to that
        factor. Source: Goyal et al., Accurate, large minibatch SGD, 2017 (arXiv 1706.02677), with a rise in epochs.
        """
        scale = self.global_batch(parts) / self.batch_size if self.batch_per_gpu else 1.0
        if epoch < self.warmup_epochs:
            scale = 1 + (scale - 1) * epoch / self.warmup_epochs
        if self.schedule == "cosine":
            return scale * self.learning_rate * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        return scale * self.learning_rate * self.drop_factor ** sum(epoch >= drop for drop in self.drop_epochs)

    def is_tested(self, epoch: int) -> bool:
        """Whether `test_every` requires an evaluation after `epoch` (0-based) of the schedule."""
        return self.test_every > 0 and (epoch + 1) % self.test_every == 0
