"""Pictures for a captioner: read from files, and made into features. Only the large encoders import torch."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from .format import ModelFile
from .weights import norm

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 64                              # pixels a side of what `tiny` sees
WIDTHS = (16, 32, 64, 64)              # of its convolutions


class PictureError(UserError):
    """A picture cannot be read; the message names the file and the reason."""


def read(picture: "str | Path | Image") -> "Image":
    """A picture of any size, in RGB. Raises PictureError for a file that is missing or does not decode."""
    from PIL import Image
    try:
        if isinstance(picture, (str, Path)):
            with Image.open(picture) as file:
                return rgb(file)
        return rgb(picture)
    except Exception as error:                                     # what a decoder raises, depends on the format
        missing = isinstance(picture, (str, Path)) and not Path(picture).exists()
        reason = "no such file" if missing else f"no picture ({error})"
        raise PictureError(f"{picture}: {' '.join(reason.split())}") from None


def rgb(image: "Image") -> "Image":
    """A picture as three channels of 8 bits, upright as its camera held it (EXIF), on white where it is transparent.

    Raises ValueError for one with more bits: Pillow would cut them off, and nearly all would be white.
    """
    from PIL import Image, ImageOps
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode}: more than 8 bits a channel; save it with 8")
    if image.getexif().get(0x0112, 1) != 1:                        # the tag of orientation
        image = ImageOps.exif_transpose(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def pixels(image: "Image") -> np.ndarray:
    """As the encoder `tiny` sees it: squeezed to a square, (3, 64, 64) in [0, 1]. Source: `corpora.pixels`."""
    return np.asarray(image.resize((SIDE, SIDE), 2), np.float32).transpose(2, 0, 1) / np.float32(255)   # 2: bilinear


def feature(image: "Image", encoder: str) -> np.ndarray:
    """The feature (D) of one of the encoders in hlstm_src/encoders.py, rounded as training reads it from its store.

    Imports torch. Raises UserError for an encoder that is unknown or whose packages or weights are missing.
    """
    return _encoder(encoder)([image])[0].numpy().astype(np.float16).astype(np.float32)


@functools.cache
def _encoder(name: str):
    from .. import encoders
    return encoders.load_encoder(name)


class Tuned:
    """A large encoder which a captioner brings along, since it was trained on with it: picture -> feature (D).

    Imports torch. Raises UserError as `feature`, ModelFileError for a file that lacks tensors of the encoder.
    """

    def __init__(self, file: ModelFile, name: str):
        from torch import from_numpy

        from .. import encoders
        self.network, self.prepare = encoders.learner(name, 0), encoders.PREPARE[name]
        state = self.network.state_dict()
        for key, tensor in state.items():
            if key.endswith("num_batches_tracked"):                # which only training reads
                file.ignore(f"encoder.{key}")
            else:
                tensor.copy_(from_numpy(file.tensor(f"encoder.{key}", tuple(tensor.shape))[0]))

    def __call__(self, image: "Image") -> np.ndarray:
        from torch import inference_mode
        with inference_mode():
            return self.network(self.prepare(image)[None])[0].numpy()


class Tiny:
    """The encoder `tiny` (`encoders.TinyCNN`) in numpy: four convolutions, batch normalisation folded into them."""

    def __init__(self, file: ModelFile, size: int):
        self.convolutions, ins = [], 3
        for k, out in enumerate(WIDTHS):
            W = file.tensor(f"encoder.places.{3 * k}.weight", (out, ins, 3, 3))[0].reshape(out, -1)
            factor, add = norm(file, f"encoder.places.{3 * k + 1}", out)
            self.convolutions.append((W * factor[:, None], add[:, None]))
            ins = out
        self.project = (file.tensor("encoder.project.0.weight", (size, 5 * ins))[0],
                        file.tensor("encoder.project.0.bias", (size,))[0])

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Pixels (3, 64, 64) in [0, 1] -> a feature (D)."""
        y = x - np.float32(0.5)
        for W, add in self.convolutions:                           # 3 x 3, stride 2, padding 1; then ReLU
            side = y.shape[1] // 2
            windows = np.lib.stride_tricks.sliding_window_view(np.pad(y, ((0, 0), (1, 1), (1, 1))), (3, 3), (1, 2))
            columns = windows[:, ::2, ::2].transpose(0, 3, 4, 1, 2).reshape(W.shape[1], -1)          # (C*9, places)
            y = np.maximum(W @ columns + add, 0).reshape(-1, side, side)
        half = y.shape[1] // 2
        parts = y, y[:, :half], y[:, half:], y[..., :half], y[..., half:]
        W, b = self.project
        return np.maximum(W @ np.concatenate([part.max((1, 2)) for part in parts]) + b, 0)
