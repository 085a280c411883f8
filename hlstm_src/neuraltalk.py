"""NeuralTalk (Karpathy and Fei-Fei, 2015; sizes of NeuralTalk2): a picture's feature in, a sentence out.

The feature, made as wide as a word by a linear layer, is the decoder's first input; then it reads the mark 0 and word
after word, and after each says how likely every word comes next, 0 being the end:
    reads   picture  0   w1  ...  wL
    says             w1  w2  ...  0
Sizes: B pictures, L words, D feature, E embedding, H hidden, V words (the mark 0 included).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lstm import HLSTM
from .search import END, beam_search

IGNORE = -100                          # a target that is padding


class NeuralTalk(nn.Module):
    """The captioner. The paper: embedding=hidden=512, dropout=0.5; cell="lstm", layers=3, or cell="hlstm", layers=1.

    Args: words V; features D; cell lstm | gru | hlstm; layers; hidden H; embedding E; dropout at the decoder's input
    and output; encoder: None for stored features (B, D); "tiny" for a small convolutional network that is trained
    along, from pixels (B, 3, 64, 64) to D numbers; "vgg16" or "efficientnet_lite0" for one that came trained and is
    trained on, from (B, 3, 224, 224); further options go to `HLSTM` (gate_width, activation, ...).
    Raises ValueError for an unknown cell or encoder.
    """

    def __init__(self, words: int, features: int, cell: str = "lstm", layers: int = 1, hidden: int = 512,
                 embedding: int = 512, dropout: float = 0.5, encoder: str | None = None, **options):
        super().__init__()
        self.encoder = None
        if encoder:
            from .encoders import ENCODERS, learner
            if encoder not in ENCODERS:
                raise ValueError(f"encoder {encoder!r}: choose one of {', '.join(ENCODERS)}, or None for stored "
                                 "features")
            self.encoder = learner(encoder, features)
        # What all pictures have in common would else grow until it saturates the gates, and hides the picture.
        self.norm = nn.BatchNorm1d(features, affine=False)
        self.picture, self.words = nn.Linear(features, embedding), nn.Embedding(words, embedding)
        if cell == "gru":
            self.rnn = nn.GRU(embedding, hidden, layers)
        elif cell in ("lstm", "hlstm"):
            options = options if cell == "hlstm" else {"gate_layers": 0}
            self.rnn = HLSTM(embedding, hidden, layers, **options)
        else:
            raise ValueError(f"cell {cell!r}: choose lstm, gru or hlstm")
        self.output, self.dropout = nn.Linear(hidden, words), dropout
        nn.init.uniform_(self.words.weight, -0.1, 0.1)             # as NeuralTalk2
        self._remember()

    @torch.no_grad()
    def _remember(self) -> None:
        """Opens the gate that keeps the state (f; of a GRU, z), so that the picture, which is seen once, is not
        forgotten before learning begins (Jozefowicz et al., 2015)."""
        last = getattr(self.rnn, "gate_layers", 0)
        for name, p in self.rnn.named_parameters():
            if name.startswith(f"bias_gate{last}_l" if last else "bias_ih_l"):
                p[self.rnn.hidden_size:2 * self.rnn.hidden_size] += 1          # the second of the gates' rows

    def forward(self, features: Tensor, inputs: Tensor, pictures: Tensor | None = None) -> Tensor:
        """features (B, D) or pixels (B, 3, height, width), inputs (B, L + 1): 0 and the words -> logits (B, L + 1, V).

        Where several captions share a picture, `pictures` (B) says which of the features each belongs to. What stands
        behind a caption's end changes nothing before it.
        """
        x = self.embed(features)
        x = x if pictures is None else x[pictures]
        x = torch.cat([x[:, None], self.words(inputs)], dim=1).transpose(0, 1)                        # (L + 2, B, E)
        y = self.rnn(F.dropout(x, self.dropout, self.training))[0][1:]
        return self.output(F.dropout(y, self.dropout, self.training)).float().transpose(0, 1)

    def embed(self, features: Tensor) -> Tensor:
        """Features or pixels -> the decoder's first input, (B, E)."""
        x = self.encode(features)
        return self.picture(self.norm.train(self.training and len(x) > 1)(x))      # one picture has no variance

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels -> features (B, D); features pass."""
        return pixels if self.encoder is None or pixels.dim() == 2 else self.encoder(pixels)

    def start(self, features: Tensor) -> tuple[Tensor, ...]:
        """The decoder's state after the picture: h and c of an LSTM or H-LSTM, h of a GRU, each (layers, B, H)."""
        return self._advance(self.embed(features), None)[1]

    def step(self, words: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Reads a word each, (B): log probabilities of the next, (B, V), and the new state. No dropout."""
        y, state = self._advance(self.words(words), state)
        return self.output(y).float().log_softmax(-1), state

    def _advance(self, x: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step of the recurrent layers: x (B, E) -> the last layer's h (B, H), the state of all."""
        if isinstance(self.rnn, nn.GRU):
            y, h = self.rnn(x[None], state and state[0])
            return y[0], (h,)
        y, state = self.rnn(x[None], state)
        return y[0], state

    @torch.no_grad()
    def caption(self, features: Tensor, beam: int = 1, longest: int = 16, length_power: float = 0.0) -> list[list[int]]:
        """Ids of the words said of each picture, (B, D) or pixels -> B lists. Source: `search.beam_search`."""
        self.eval()

        def step(words: np.ndarray, parents: np.ndarray, state: tuple[Tensor, ...]):
            index = torch.from_numpy(parents).to(features.device)
            state = tuple(s[:, index] for s in state)
            log_probs, state = self.step(torch.from_numpy(words).to(features.device), state)
            return log_probs.cpu().numpy(), state
        return beam_search(step, self.start(features), len(features), beam, longest, length_power)


def collate(captions: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids of the words of B captions -> what the decoder reads and what it should say, both (B, L + 1), L the longest.

    Reads 0 and the words; says the words and 0. Behind the end it reads 0, and what it says there is ignored.
    """
    inputs = torch.full((len(captions), 1 + max(map(len, captions))), END)
    targets = torch.full_like(inputs, IGNORE)
    for k, caption in enumerate(captions):
        n = len(caption)
        inputs[k, 1:n + 1] = targets[k, :n] = torch.tensor(caption, dtype=torch.long)
        targets[k, n] = END
    return inputs, targets


def caption_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, the mean over all words and end marks; padding is ignored. logits (B, L + 1, V)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
