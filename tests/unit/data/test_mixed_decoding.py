"""DALI's graph for a GPU, which no test here can run: its operators take what they are given."""

import pytest
from nvidia.dali import Pipeline, fn

from laasp_ray.config import DataConfig
from laasp_ray.data.loaders import dali
from laasp_ray.errors import ConfigError


@pytest.mark.parametrize(("training", "resize", "operator"), [(True, 256, "image_slice"), (False, 256, "image")])
@pytest.mark.parametrize(("decoder", "given"), [("mixed", {"hw_decoder_load": 0.25}), ("cpu", {})])
def test_the_gpus_own_decoder_gets_its_share(training, resize, operator, decoder, given, monkeypatch):
    made = []
    decode = getattr(fn.decoders, operator)
    monkeypatch.setattr(fn.decoders, operator, lambda *of, **options: made.append(options) or decode(*of, **options))
    config = DataConfig(hw_decoder_load=0.25, eval_resize=resize)
    pipeline = object.__new__(dali._DecodePipeline)
    pipeline._config, pipeline._uint8 = config, False
    pipeline._crops_first = training
    pipeline._resizes_first = not training
    with Pipeline(batch_size=2, num_threads=1, device_id=0, exec_dynamic=True) as graph:
        graph.set_outputs(pipeline._graph(decoder))  # not built, so that no driver is needed
    (options,) = made
    assert options["device"] == decoder
    assert {key: value for key, value in options.items() if key == "hw_decoder_load"} == given


def test_a_share_above_one_is_refused():
    with pytest.raises(ConfigError, match=r"data\.hw_decoder_load is 1\.5, must be a share from 0 to 1"):
        DataConfig(hw_decoder_load=1.5)
