"""Encoders by timm name: the packaged weights really recognise things, and files that do not fit are refused."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from skimage import data as photographs

from runtime.preprocess import PreprocessSpec, prepare
from train.encoder import (
    PACKAGE_ENCODER,
    Encoder,
    Standardizer,
    load_encoder,
    load_exactly,
    read_state,
    with_standardizer,
)
from train.encoder import _package_weights as package_weights
from train.errors import CheckpointError, ConfigError
from train.model import PixelNormalizer

# ImageNet classes: 281 tabby, 282 tiger cat, 285 Egyptian cat; 967 espresso.
CATS, ESPRESSO = {281, 282, 285}, 967


def test_packaged_weights_recognise_a_cat_and_a_coffee():
    net = timm.create_model(PACKAGE_ENCODER, num_classes=1000).eval()
    path, state = package_weights(PACKAGE_ENCODER)
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
    with pytest.raises(ConfigError, match="wanted a weight file, 'package' or 'none'"):
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
