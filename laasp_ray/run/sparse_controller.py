"""The loop of a run that makes groups sparse: an iteration is a stage, whose masks hold in the training after it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from laasp_ray.cost.macs import count_macs
from laasp_ray.methods.group_sparsity import layer_rules, take_stage
from laasp_ray.methods.sparsity_report import measure_sparsity, sparsity_to_json
from laasp_ray.pruning.network import NetworkState, rebuild
from laasp_ray.pruning.sparsity.groups import masked
from laasp_ray.run.controller import UNPRUNED, Controller
from laasp_ray.run.events import IterationDone, PhaseStarted, RunFinished, data_of
from laasp_ray.store.artifact import save_pruned
from laasp_ray.store.checkpoint import save_checkpoint
from laasp_ray.store.sparse import load_masks, save_masks
from laasp_ray.train.loop import TrainingPhase

REPORT = "sparsity.json"
"""The report by layer, in the run's folder."""


class SparseController(Controller):
    """One run whose config has `sparsity`; a stage is one iteration's event, its masks are in the store before it."""

    def _restore(self) -> tuple[NetworkState, Mapping[str, torch.Tensor]]:
        network, optimizer_state = super()._restore()
        iteration = self.state.iteration
        self._masks: Mapping[str, bytes] = load_masks(self._parts.storage, iteration) if iteration else {}
        # A run cut off between a stage and its first epoch has the weights from before the stage.
        return NetworkState(network.plan, masked(network.tensors, self._masks)), optimizer_state

    def _iteration(self) -> None:
        started = time.perf_counter()
        config, parts, number = self._config, self._parts, self.state.iteration + 1
        assert config.sparsity is not None
        stages = config.sparsity.all_stages
        detail = f"stage {number}: {stages[number - 1]} of every {config.sparsity.group}"
        self._notify(PhaseStarted(phase="prune", detail=detail))
        if number == 1 and config.sparsity.from_run is None:
            save_checkpoint(parts.storage, UNPRUNED, model=self._network.tensors)
        model = rebuild(self._unpruned, self._network)
        stage = take_stage(model, self._network, config.sparsity, config.prune.ignored, self._masks, number=number)
        save_masks(parts.storage, number, stage.masks)
        self._network, self._optimizer_state, self._masks = stage.network, {}, stage.masks
        weights = sum(stage.network.tensors[name].numel() for name in stage.masks)
        zeros = sum(int((stage.network.tensors[name] == 0).sum()) for name in stage.masks)
        self._record(
            IterationDone(
                iteration=number,
                seconds={"total": time.perf_counter() - started},
                ends_pruning=number == len(stages),
                details={
                    "prune": {layer: rule.pruned_per_group for layer, rule in stage.layers.rules.items()},
                    "group": config.sparsity.group,
                    "dense": stage.layers.dense,
                    "weights": weights,
                    "zeros": zeros,
                },
                text=(
                    f"stage {number} of {len(stages)}: {zeros:,} of the {weights:,} weights of {len(stage.masks)} "
                    f"layers are zero; left dense: {len(stage.layers.dense)} layers"
                ),
            )
        )

    def _training_phase(self) -> TrainingPhase:
        return replace(super()._training_phase(), masks=self._masks)

    def _save(self, model: nn.Module, summary: RunFinished) -> Mapping[str, Any]:
        config, storage = self._config, self._parts.storage
        assert config.sparsity is not None
        layers = layer_rules(model, config.sparsity, config.prune.ignored, config.sparsity.prune)
        rows = measure_sparsity(
            model,
            layers.rules,
            layers.dense,
            self._masks,
            count_macs(model, self._example).per_layer,
            seed=config.seed,
        )
        storage.write(REPORT, json.dumps(sparsity_to_json(rows), indent=1).encode())
        sizes = [tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()]
        details = {
            "weights": sum(row.weights for row in rows),
            "weights_kept": sum(row.kept for row in rows),
            "weights_bytes_dense": sum(sizes),
        }
        written = save_pruned(
            storage.child("pruned"),
            model=model,
            model_config=config.model,
            plan=self._network.plan,
            metrics=data_of(replace(summary, details=details)),
            masks=self._masks,
        )
        return {**details, "weights_bytes": written}

    def _result(self, summary: RunFinished) -> str:
        found = summary.details
        return (
            f"{found['weights_kept'] / found['weights']:.2%} of all weights of convolutions and linear layers left, "
            f"{found['weights_bytes']:,} bytes on disk for {found['weights_bytes_dense']:,}"
        )
