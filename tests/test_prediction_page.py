"""docs/prediction.md: its code runs, and what is exported and served says what the classifier says."""

import functools
import http.client
import importlib.util
import json
import re
import sys
import threading
from http.server import HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import trainer
from PIL import Image
from torch import nn

from lightning_ssesam import LongTailClassifier
from lightning_ssesam.data import ImageInput
from lightning_ssesam.models import SmallConvNet

PAGE = Path(__file__).parent.parent / "docs" / "prediction.md"
NAMES = ["cat", "dog", "frog", "ship"]
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)


class MyNetwork(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))


def save(path, backbone, size):
    """Save a classifier whose probabilities are far from equal, mirror images and a correction included."""
    torch.manual_seed(0)
    model = LongTailClassifier([60, 30, 14, 6], backbone, class_names=NAMES, tta="hflip")
    model.image_input = ImageInput(size)
    *_, weight, _ = model.backbone.parameters()
    nn.init.normal_(weight, std=5)
    model.correct(scale=[1.0, 0.9, 1.1, 1.0], shift=[0.0, 0.1, 0.2, 0.3])
    path.parent.mkdir(parents=True, exist_ok=True)
    runner = trainer(max_epochs=1)
    runner.strategy.connect(model)
    runner.save_checkpoint(path)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names that the page defines, run in order in a folder of its own; without ONNX where it is not installed."""
    folder = tmp_path_factory.mktemp("page")
    save(folder / "photos" / "best" / "weights.ckpt", functools.partial(SmallConvNet, width=8, in_channels=3), 32)
    save(folder / "mine.ckpt", MyNetwork(4), 8)
    random = np.random.default_rng(0)
    (folder / "new_images").mkdir()
    for number in (1, 2):
        pixels = random.integers(0, 256, (50 + number, 70 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"new_images/photo_00{number}.jpg")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    if needs_onnx.args[0]:
        blocks = [block for block in blocks if "onnx" not in block]
    served, names = [], {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, "my_networks", SimpleNamespace(MyNetwork=MyNetwork))
        # Port 8000 may be taken. The test serves when it asks.
        patch.setattr(HTTPServer, "__init__", functools.partialmethod(_on_any_port, HTTPServer.__init__))
        patch.setattr(HTTPServer, "serve_forever", lambda self, *_: served.append(self))
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    yield SimpleNamespace(folder=folder, server=served[0] if served else None, **names)
    for server in served:
        server.server_close()


def _on_any_port(self, initialise, address, handler):
    assert address == ("127.0.0.1", 8000)
    initialise(self, ("127.0.0.1", 0), handler)


def expected(page, pixels):
    """The probabilities of the classifier in the checkpoint, written out."""
    model = LongTailClassifier.load_from_checkpoint(page.folder / "photos/best/weights.ckpt").eval()
    form = model.image_input
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (form.mean, form.std))
    inputs = (pixels / 255 - mean) / std
    with torch.inference_mode():
        logits = [model.backbone(x) for x in (inputs, inputs.flip(-1))]
        factors = torch.tensor([1.0, 0.9, 1.1, 1.0]), torch.tensor([0.0, 0.1, 0.2, 0.3])
        shares = [(z * factors[0] + factors[1]).softmax(1) for z in logits]
    return (shares[0] + shares[1]) / 2


def some_pixels(number):
    return torch.randint(0, 256, (number, 3, 32, 32), dtype=torch.uint8)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_predictions_of_the_page(page):
    pictures = torch.stack(page.pictures)
    pixels = torch.stack([_pixels(page.folder / path, 32) for path in page.paths])
    shares = expected(page, pixels)
    torch.testing.assert_close(torch.cat(page.batches), shares, rtol=0, atol=1e-5)
    torch.testing.assert_close(page.probabilities, shares[0], rtol=0, atol=1e-5)
    assert page.best == shares[0].argsort(descending=True)[:2].tolist()
    assert pictures.shape == (2, 3, 32, 32)
    assert shares.max() > 0.5
    images = torch.randn(2, 3, 8, 8)
    net = MyNetwork(4)
    net.load_state_dict(page.mine.backbone.state_dict())
    torch.testing.assert_close(page.mine.backbone(images), net(images))


def _pixels(path, size):
    """The pixels of a picture as the library makes them, before they are normalised."""
    plain = ImageInput(size, mean=(0.0,) * 3, std=(1.0,) * 3).transform()
    with Image.open(path) as image:
        return (255 * plain(image)).round()


@pytest.mark.parametrize("number", [1, 5])
def test_exported_program_is_the_classifier(page, number):
    pixels = some_pixels(number)
    torch.testing.assert_close(page.exported(pixels).detach(), expected(page, pixels), rtol=0, atol=1e-5)
    assert page.names == NAMES


@needs_onnx
@pytest.mark.parametrize("number", [1, 5])
def test_onnx_model_is_the_classifier(page, number):
    pixels = some_pixels(number)
    (shares,) = page.model.run(None, {"pixels": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(shares), expected(page, pixels), rtol=0, atol=1e-5)
    assert page.about == {"class_names": NAMES, "image_size": 32}


@needs_onnx
def test_server_answers_with_the_probabilities(page):
    path = page.folder / "new_images" / "photo_001.jpg"
    thread = threading.Thread(target=page.server.handle_request)
    thread.start()
    connection = http.client.HTTPConnection(*page.server.server_address, timeout=30)
    connection.request("POST", "/", path.read_bytes())
    answer = json.loads(connection.getresponse().read())
    connection.close()
    thread.join()
    shares = expected(page, _pixels(path, 32)[None])[0]
    assert list(answer) == NAMES
    assert list(answer.values()) == pytest.approx(shares.tolist(), abs=1e-5)


@needs_onnx
@pytest.mark.parametrize("size", [8, 64, 65, 100, 224])
@pytest.mark.parametrize("shape", [(231, 97), (64, 200), (101, 101), (301, 300)])
def test_server_prepares_a_picture_as_the_library_does(page, size, shape, tmp_path):
    random = np.random.default_rng(1)
    picture = Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    found = np.asarray(page.prepare(picture, size)).transpose(2, 0, 1)
    np.testing.assert_array_equal(found, _pixels(tmp_path / "a.png", size).numpy())
