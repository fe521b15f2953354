"""Encoders by timm name: the packaged weights really recognise things, and files that do not fit are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from skimage import data as photographs
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from runtime.preprocess import PreprocessSpec, prepare
from train.encoder import RESIDUAL_GAIN, Encoder, Standardizer, residual, spatial_statistics, with_standardizer
from train.encoder_weights import PACKAGE_ENCODER, load_encoder, load_exactly, read_state
from train.encoder_weights import _package_weights as package_weights
from train.errors import CheckpointError, ConfigError
from train.model import PixelNormalizer

# ImageNet classes: 281 tabby, 282 tiger cat, 285 Egyptian cat; 967 espresso.
CATS, ESPRESSO = {281, 282, 285}, 967


def test_packaged_weights_recognise_a_cat_and_a_coffee():
    net = timm.create_model(PACKAGE_ENCODER, num_classes=1000).eval()
    path, state = package_weights()
    load_exactly(net, state, source=path)
    encoder = Encoder(PACKAGE_ENCODER)
    spec = PreprocessSpec()
    pictures = np.stack([prepare(photographs.chelsea(), spec), prepare(photographs.coffee(), spec)])
    with torch.inference_mode():
        classes = net(PixelNormalizer(encoder.mean, encoder.std)(torch.from_numpy(pictures))).argmax(1).tolist()
    assert classes[0] in CATS
    assert classes[1] == ESPRESSO


def test_packaged_weights_are_for_one_encoder_only():
    with pytest.raises(ConfigError, match="got --encoder resnet50, wanted --encoder tf_efficientnet_lite0"):
        load_encoder("resnet50", "package")


def test_cells_of_an_average_pooled_map_average_to_the_embedding():
    encoder = Encoder("test_resnet").eval()
    pixels = torch.randn(2, 3, 160, 160, generator=torch.manual_seed(0))
    with torch.inference_mode():
        output = encoder(pixels)
        torch.testing.assert_close(output.cells.mean((1, 2)), output.pooled, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(encoder.embed(pixels), output.pooled)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_vit", "test_convnext"])
def test_every_kind_of_encoder_gives_one_row_per_cell(name):
    encoder = Encoder(name).eval()
    with torch.inference_mode():
        output = encoder(torch.zeros(2, 3, *encoder.input_size))
    assert output.pooled.shape == (2, encoder.width)
    assert output.cells.ndim == 4
    assert output.cells.shape[0] == 2
    assert output.cells.shape[3] == encoder.width


def test_spatial_statistics_are_mean_and_standard_deviation_over_cells():
    values = torch.tensor([[[[0.0, 4.0], [4.0, 0.0]], [[3.0, 3.0], [3.0, 3.0]]]])
    # The variance of a constant map is held at 1e-6.
    torch.testing.assert_close(spatial_statistics(values), torch.tensor([[2.0, 3.0, 2.0, 1e-3]]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_depths_append_statistics_and_leave_the_rest_as_it_was(name):
    torch.manual_seed(1)
    plain, deep = Encoder(name).eval(), Encoder(name, depths=(1, 3)).eval()
    load_exactly(deep.net, plain.net.state_dict(), source="plain")
    pixels = torch.randn(2, 3, *plain.input_size)
    own = plain.width
    with torch.inference_mode():
        before, after = plain(pixels), deep(pixels)
        maps = plain.net.forward_intermediates(pixels, indices=[1, 3], output_fmt="NCHW", intermediates_only=True)
        torch.testing.assert_close(deep.embed(pixels), after.pooled)
    assert deep.width == after.pooled.shape[1] == after.cells.shape[3]
    torch.testing.assert_close(after.pooled[:, :own], before.pooled)
    torch.testing.assert_close(after.cells[..., :own], before.cells)
    torch.testing.assert_close(after.pooled[:, own:], torch.cat([spatial_statistics(m) for m in maps], dim=1))
    # Means of cells average to the mean of the picture, and its standard deviation stands in each cell.
    torch.testing.assert_close(after.cells.mean((1, 2))[:, own:], after.pooled[:, own:], rtol=1e-4, atol=1e-5)


def test_depths_of_a_vit_append_its_class_tokens():
    torch.manual_seed(1)
    plain, deep = Encoder("test_vit").eval(), Encoder("test_vit", depths=(1, 3)).eval()
    load_exactly(deep.net, plain.net.state_dict(), source="plain")
    pixels = torch.randn(2, 3, *plain.input_size)
    with torch.inference_mode():
        before, after = plain(pixels), deep(pixels)
        tokens = plain.net.patch_embed(pixels)
        tokens = plain.net.norm_pre(plain.net._pos_embed(tokens))
        found = []
        for block in plain.net.blocks[:4]:
            tokens = block(tokens)
            found.append(tokens)
    torch.testing.assert_close(after.pooled, torch.cat((before.pooled, found[1][:, 0], found[3][:, 0]), dim=1))
    torch.testing.assert_close(after.cells[..., -64:].flatten(1, 2), found[3][:, 1:])
    assert deep.width == after.cells.shape[3] == before.pooled.shape[1] + 2 * 64


@pytest.mark.parametrize("depths", [(5,), (3, 1), (1, 1), (-1,)])
def test_depths_that_are_not_there_are_refused(depths):
    with pytest.raises(ConfigError, match=r"--encoder-depths: got .*, wanted rising numbers from 0 to 4"):
        Encoder("test_resnet", depths=depths)


def test_depth_whose_map_does_not_fit_the_last_one_is_refused():
    encoder = Encoder("legacy_xception", depths=(2,)).eval()
    with pytest.raises(ConfigError, match="got a map of 37 x 37 cells, wanted a multiple of the last one, 10 x 10"):
        encoder(torch.zeros(1, 3, 299, 299))


def test_residual_is_what_the_mean_around_a_pixel_does_not_say():
    pixels = torch.zeros(1, 1, 4, 5)
    pixels[0, 0, 0, 0] = 9.0
    expected = torch.zeros(4, 5)
    # The corner has four pixels around it, itself included; those beside it, six and nine.
    expected[0, 0], expected[0, 1], expected[1, 0], expected[1, 1] = 9 - 9 / 4, -9 / 6, -9 / 6, -1.0
    torch.testing.assert_close(residual(pixels)[0, 0], RESIDUAL_GAIN * expected)
    assert not residual(torch.full((2, 3, 6, 7), 5.0)).any()


def test_residual_of_photographs_has_about_the_spread_of_the_pixels_that_encoders_know():
    normalizer = PixelNormalizer(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    pictures = (photographs.chelsea(), photographs.coffee(), photographs.astronaut(), photographs.rocket())
    spreads = [float(residual(normalizer(torch.from_numpy(picture[None]))).std()) for picture in pictures]
    assert all(0.3 < spread < 3 for spread in spreads), spreads


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_encoder_of_residuals_is_the_plain_one_behind_the_filter_and_both_are_joined(name):
    torch.manual_seed(1)
    plain = Encoder(name, depths=(1,)).eval()
    filtered, both = (Encoder(name, depths=(1,), reads=reads).eval() for reads in ("residual", "both"))
    for encoder in (filtered, both):
        load_exactly(encoder.net, plain.net.state_dict(), source="plain")
    pixels = torch.randn(3, 3, *plain.input_size)
    with torch.inference_mode():
        of_pixels, of_residual, joined = plain(pixels), plain(residual(pixels)), both(pixels)
        torch.testing.assert_close(filtered(pixels), of_residual)
        torch.testing.assert_close(both.embed(pixels), joined.pooled)
    assert (filtered.width, both.width) == (plain.width, 2 * plain.width)
    torch.testing.assert_close(joined.pooled, torch.cat((of_pixels.pooled, of_residual.pooled), dim=1))
    torch.testing.assert_close(joined.cells, torch.cat((of_pixels.cells, of_residual.cells), dim=3))
    assert (of_pixels.pooled - of_residual.pooled).abs().max() > 0.1


def test_parts_of_pixels_and_of_residuals_have_other_names():
    names = {reads: Encoder("test_resnet", depths=(1,), reads=reads).part_names() for reads in ("rgb", "residual")}
    assert not set(names["rgb"]) & set(names["residual"])
    assert Encoder("test_resnet", depths=(1,), reads="both").part_names() == names["rgb"] + names["residual"]


# Columns of the last map of 96 pixels; the stem of a ResNet halves twice, that of an EfficientNet once.
@pytest.mark.parametrize(
    ("name", "columns", "fine"), [("test_resnet", 3, 12), ("test_efficientnet", 3, 6), (PACKAGE_ENCODER, 3, 6)]
)
def test_stem_without_downsampling_has_the_same_weights_and_a_finer_map(name, columns, fine):
    plain, finer = Encoder(name).eval(), Encoder(name, early_downsampling=False).eval()
    load_exactly(finer, plain.state_dict(), source=Path("plain"))
    pixels = torch.randn(1, 3, 96, 96, generator=torch.manual_seed(0))
    with torch.inference_mode():
        assert plain(pixels).cells.shape[1:3] == (columns, columns)
        assert finer(pixels).cells.shape[1:3] == (fine, fine)


def test_resnet50_without_downsampling_is_the_published_network():
    net = Encoder("resnet50", early_downsampling=False).net
    assert (net.conv1.kernel_size, net.conv1.stride, net.conv1.padding) == ((7, 7), (1, 1), (3, 3))
    assert (net.maxpool.kernel_size, net.maxpool.stride, net.maxpool.padding) == (3, 1, 1)
    assert net.layer2[0].conv2.stride == (2, 2)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_encoder_without_such_a_stem_is_refused(name):
    with pytest.raises(ConfigError, match=f"--no-early-downsampling: got --encoder {name}, wanted an encoder with a "):
        Encoder(name, early_downsampling=False)


@pytest.mark.parametrize(
    ("name", "first", "last", "before"),
    [
        ("test_resnet", "net.layer4.0", "net.layer4.0", "net.layer3"),
        ("test_efficientnet", "net.blocks.4", "net.bn2", "net.blocks.3"),
        ("test_vit", "net.blocks.5", "net.norm", "net.blocks.4"),
        ("test_convnext", "net.stages.3.blocks", "net.head.norm", "net.stages.3.downsample"),
    ],
)
def test_last_block_is_the_one_before_the_pooling_with_what_follows_it(name, first, last, before):
    encoder = Encoder(name)
    names = encoder.last_blocks(1)
    assert any(parameter.startswith(first) for parameter in names)
    assert any(parameter.startswith(last) for parameter in names)
    assert not any(parameter.startswith(before) for parameter in names)
    assert encoder.last_blocks(0) == []
    assert set(names) < set(encoder.last_blocks(2)) < {parameter for parameter, _ in encoder.named_parameters()}
    with pytest.raises(ConfigError, match=rf"--stage2.train-encoder-blocks 99: got {name}, which has \d+ blocks"):
        encoder.last_blocks(99)


def test_standardizer_takes_mean_and_scale_out_and_leaves_dead_dimensions_small():
    rows = torch.randn(500, 4, generator=torch.manual_seed(0)) * torch.tensor([1.0, 30.0, 0.01, 0.0]) + 5
    standardizer = Standardizer(4)
    assert torch.equal(standardizer(rows), rows)
    standardizer.fit(rows.mean(0), rows.std(0, correction=0))
    found = standardizer(rows)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found.mean(0), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(found[:, :3].std(0, correction=0), torch.ones(3), rtol=1e-3, atol=1e-3)
    assert found[:, 3].abs().max() < 1e-3


def test_encoder_without_a_standardizer_has_the_state_it_always_had():
    plain, standardized = (with_standardizer(Encoder("test_resnet"), enabled=enabled) for enabled in (False, True))
    assert all(name.startswith("net.") for name in plain.state_dict())
    added = standardized.state_dict().keys() - plain.state_dict().keys()
    assert added == {"standardizer.mean", "standardizer.scale"}


def test_standardized_embedding_and_cells_are_those_of_the_network_standardized():
    encoder = with_standardizer(Encoder("test_resnet"), enabled=True).eval()
    encoder.standardizer.fit(torch.full((encoder.width,), 2.0), torch.full((encoder.width,), 4.0))
    pixels = torch.randn(2, 3, 160, 160, generator=torch.manual_seed(0))
    with torch.inference_mode():
        expected, output = (encoder.pool(pixels) - 2) / 4, encoder(pixels)
        torch.testing.assert_close(encoder.embed(pixels), expected)
        torch.testing.assert_close(output.pooled, expected)
        torch.testing.assert_close(output.cells.mean((1, 2)), expected, rtol=1e-4, atol=1e-5)


def test_unknown_name_lists_near_ones():
    with pytest.raises(ConfigError, match="got 'resnet5', wanted a timm model name: near matches"):
        Encoder("resnet5")


def test_channels_last_network_is_refused():
    with pytest.raises(ConfigError, match="channels-last feature map"):
        Encoder("swin_tiny_patch4_window7_224")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_file_are_loaded_and_the_classifier_is_left_out(tmp_path, suffix):
    torch.manual_seed(5)
    net = timm.create_model("test_resnet", num_classes=7)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(net.state_dict(), path)
    else:
        torch.save(net.state_dict(), path)
    encoder = load_encoder("test_resnet", str(path))
    for name, value in encoder.net.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("conv1.0.weight"), r"got 1 keys missing \['conv1.0.weight'\]"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 surplus \['extra'\]"),
        (lambda s: s.update({"conv1.0.weight": torch.zeros(1)}), r"1 of another shape \['conv1.0.weight'\]"),
    ],
    ids=["missing", "surplus", "shape"],
)
def test_file_that_does_not_fit_is_refused(tmp_path, change, message):
    state = dict(timm.create_model("test_resnet", num_classes=0).state_dict())
    assert "conv1.0.weight" in state
    change(state)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_encoder("test_resnet", str(tmp_path / "weights.safetensors"))


def test_no_weights_at_all_must_be_said():
    with pytest.raises(ConfigError, match=r"weights of resnet50, or 'none' .*--encoder-weights resnet50.safetensors"):
        load_encoder("resnet50", "")


def test_missing_garbage_and_executable_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_state(tmp_path / "none.pth")
    for suffix in (".pth", ".safetensors"):
        (tmp_path / f"garbage{suffix}").write_bytes(b"not weights at all")
        with pytest.raises(CheckpointError, match="wanted a safetensors file or a state dictionary"):
            read_state(tmp_path / f"garbage{suffix}")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "nested.pth")
    with pytest.raises(CheckpointError, match="a flat dictionary of tensors"):
        read_state(tmp_path / "nested.pth")
    torch.save(Encoder("test_resnet"), tmp_path / "pickled.pth")
    with pytest.raises(CheckpointError, match="wanted a safetensors file"):
        read_state(tmp_path / "pickled.pth")
