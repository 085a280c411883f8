"""The benchmark of whole recognisers: contestants hear the same, and a fresh process is timed."""

import pytest
import torch

from hlstm_src import bench_speech
from hlstm_src.audio import ALPHABET
from hlstm_src.compact.pack import pack
from hlstm_src.corpora import SpeechCorpus
from hlstm_src.deepspeech2 import DeepSpeech2
from hlstm_src.masks import ConnectionMasks, save_model
from hlstm_src.profiles import MINI_SPEECH, ROOT


def test_the_engine_hears_what_torch_hears_and_both_are_timed(tmp_path):
    torch.manual_seed(0)
    sizes = {"labels": len(ALPHABET), "cell": "hlstm", "layers": 1, "hidden": 16, "channels": 4}
    model = DeepSpeech2(**sizes).eval()
    masks = ConnectionMasks(model, "rnns.*weight_*", density=0.2)
    path, corpus = tmp_path / "seed0.safetensors", SpeechCorpus(ROOT / MINI_SPEECH)
    save_model(path, model, masks, {"format": 1, "benchmark": "speech", "model": sizes, "alphabet": ALPHABET})
    rows, seconds = bench_speech.speech(path, corpus, limit=2, rounds=1)
    assert seconds > 0 and len({row.engine for row in rows}) == len(rows) == 5
    more, _ = bench_speech.speech(path, corpus, limit=1, rounds=1, against=[path])
    assert [row.engine for row in more[5:]] == ["seed0, torch", "seed0, engine"]
    more, _ = bench_speech.speech(path, corpus, limit=1, rounds=1, against=["ds2-gru4"])       # needs no training
    assert [row.engine for row in more[5:]] == ["ds2-gru4, torch", "ds2-gru4, engine"]
    with pytest.raises(ValueError, match="seed0.safetensors: seed0 takes part already"):
        bench_speech.speech(path, corpus, against=[path, path])
    for name in ("ds2-hlstm3-gp", "nt-lstm1"):
        with pytest.raises(ValueError, match=f"{name}: no dense recogniser; name the file"):
            bench_speech.speech(path, corpus, against=[name])
    pack(path, tmp_path / "compact")
    save_model(tmp_path / "captioner", model, masks, {"benchmark": "captions"})
    for file in (tmp_path / "captioner", tmp_path / "compact"):
        with pytest.raises(ValueError, match=f"{file.name}: no trained recogniser"):
            bench_speech.speech(path, corpus, against=[file])
    with pytest.raises(ValueError, match="a folder; name the file to write in it"):
        pack(path, tmp_path)
    begun, peak = bench_speech.start(path, corpus.split("test")[0].path)
    assert begun > 0 and peak > 1
