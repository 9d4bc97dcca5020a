"""What layers do and move, by hand; and what is said of a pruned network that is not faster."""

from torch import nn

from laasp_ray.cost.speedup import LayerWork, is_faster, layer_work, why_not_faster


def network(width, kernel=1):
    return nn.Sequential(
        nn.Conv2d(8, width, kernel, padding=kernel // 2, bias=False), nn.Flatten(), nn.Linear(width * 16, 8, bias=False)
    )


def test_work_by_hand():
    work = layer_work(network(16), (8, 4, 4), batch_size=2)
    # 2 images, 16 positions, 8 x 16 weights; 8 x 16 values in and 16 x 16 out for each image, at 4 bytes.
    assert work["0"] == LayerWork((8, 16), 2 * 16 * 128, 4 * (2 * (128 + 256) + 128))
    assert work["2"] == LayerWork((256, 8), 2 * 2048, 4 * (2 * (256 + 8) + 2048))
    assert work["2"].intensity == 4096 / 10304


def test_groups_transposed_layers_and_several_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
            self.up = nn.ConvTranspose2d(4, 2, 2, stride=2, bias=False)

        def forward(self, x):
            return self.up(self.depthwise(self.depthwise(x)))

    work = layer_work(Twice(), (4, 5, 5), batch_size=1)
    assert work["depthwise"].macs == 2 * 25 * 4 * 9 and work["depthwise"].channels == (4, 4)
    assert work["depthwise"].moved_bytes == 2 * 4 * (100 + 100 + 36)
    assert work["up"].macs == 25 * 4 * 2 * 4


def test_the_model_is_left_as_it_was():
    model = network(16).train()
    layer_work(model, (8, 4, 4), 1)
    assert model.training and not model[0]._forward_hooks


def test_ragged_channels_are_told_with_the_setting_that_keeps_them():
    text = why_not_faster(network(64, 3), network(61, 3), (8, 4, 4), 64)
    # 16 x 8 x 61 x 9 and 61 x 16 x 8 multiply-accumulates are left; 61 is no multiple of 8, 976 = 61 x 16 is.
    assert text.startswith(
        "1 of 2 layers (90% of the multiply-accumulates) have channel counts that are no longer a multiple of 8: "
        "--set prune.round_to=8 keeps them"
    )


def test_layers_that_wait_for_memory_are_told():
    text = why_not_faster(network(64), network(32), (8, 4, 4), 1)
    assert text == (
        "2 of 2 layers (100%) are bound by memory at this batch, with fewer than 10 multiply-accumulates a byte: "
        "--latency-reduction prunes until the measured time has fallen, and a larger batch uses weights more often"
    )


def test_layers_that_show_no_reason():
    wide = nn.Sequential(nn.Conv2d(64, 256, 3, padding=1), nn.Conv2d(256, 64, 3, padding=1))
    narrow = nn.Sequential(nn.Conv2d(64, 128, 3, padding=1), nn.Conv2d(128, 64, 3, padding=1))
    assert why_not_faster(wide, narrow, (64, 16, 16), 8).startswith("its layers show no reason; what is not in them")


def test_three_percent_are_needed_to_be_faster():
    assert is_faster(100.0, 97.0) and not is_faster(100.0, 98.0)
