"""The section `model`: the unpruned network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from laasp_ray.config.fields import Doc, check, check_types


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The unpruned network: a builder's name with its arguments, and the shape of one input."""

    builder: Annotated[str, Doc("what builds the network: a name of models/, or package.module:function")]
    arguments: Annotated[Mapping[str, Any], Doc("the builder's keyword arguments")] = field(default_factory=dict)
    input_shape: Annotated[tuple[int, int, int], Doc("one input: channels, height, width")] = (3, 224, 224)

    def __post_init__(self) -> None:
        check_types(self, "model.")
        check(
            min(self.input_shape) >= 1,
            "model.input_shape",
            self.input_shape,
            "three positive numbers: channels, height, width",
        )
