"""Extractors: CLIP's features are transformers', Inception's are torch-fidelity's, and other files are refused in a line."""

import io
import json
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel

from src.errors import ExitCode, UserError
from src.evaluation import features, inputs
from src.evaluation.features import ClipFeatures, InceptionFeatures, extract
from src.terminal import Terminal
from tests.tiny.clips import save_clip


def noise(seed: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype="uint8"))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("features") / "my-clip")


@pytest.fixture
def paths(tmp_path):
    found = []
    for index, size in enumerate([(40, 40), (40, 40), (64, 32), (33, 57), (40, 40)]):
        noise(index, size).save(tmp_path / f"{index}.png")
        found.append(tmp_path / f"{index}.png")
    return found


# --- CLIP ------------------------------------------------------------------------------------------------------------------


def test_clip_features_are_those_of_transformers(clip_folder, paths, monkeypatch) -> None:
    monkeypatch.setattr(features, "BATCH", 2)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = torch.cat([processor(Image.open(path), return_tensors="pt").pixel_values for path in paths])
    with torch.no_grad():
        wanted = model.visual_projection(model.vision_model(pixels).pooler_output)
    wanted = torch.nn.functional.normalize(wanted, dim=-1).double().numpy()
    found = extract(ClipFeatures(clip_folder, "cpu"), paths, Terminal(), "clip")
    assert found.keys() == {"features"}
    assert found["features"].dtype == np.float64
    assert found["features"] == pytest.approx(wanted, abs=2e-3)


def test_a_batch_changes_nothing(clip_folder, paths, monkeypatch) -> None:
    clip = ClipFeatures(clip_folder, "cpu")
    together = extract(clip, paths, Terminal(), "clip")["features"]
    monkeypatch.setattr(features, "BATCH", 1)
    assert extract(clip, paths, Terminal(), "clip")["features"] == pytest.approx(together, abs=1e-6)


def test_texts_and_the_names(clip_folder, tmp_path) -> None:
    clip = ClipFeatures(clip_folder, "cpu")
    assert clip.text_features(["a red circle", "two"]).shape == (2, 16)
    assert clip.text_features([]).shape == (0, 16)
    assert (clip.name, clip.is_own) == ("CLIP my-clip", False)
    assert not clip.clip.is_cut("a red circle")
    assert clip.clip.is_cut("a red circle " * 60)
    snapshot = tmp_path / "models--openai--clip-vit-large-patch14" / "snapshots" / "0123"
    assert features.public_name(snapshot) == "openai/clip-vit-large-patch14"


def test_what_is_no_clip_is_refused_in_a_line(clip_folder, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    with pytest.raises(UserError, match="is no CLIPModel with both towers") as caught:
        ClipFeatures(tmp_path, "cpu")
    assert caught.value.exit_code == ExitCode.REFUSED
    broken = save_clip(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        ClipFeatures(broken, "cpu")
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_are_refused(paths) -> None:
    def broken(pictures):
        return {"features": torch.zeros(len(pictures), 3), "logits": torch.full((len(pictures), 3), float("nan"))}

    with pytest.raises(UserError, match="not finite"):
        extract(broken, paths, Terminal(), "broken")


def test_a_damaged_picture_is_named(clip_folder, paths) -> None:
    paths[3].write_bytes(paths[3].read_bytes()[:200])
    with pytest.raises(UserError, match=r"3\.png"):
        extract(ClipFeatures(clip_folder, "cpu"), paths, Terminal(), "clip")


def test_devices() -> None:
    assert features.pick_device("cpu") == "cpu"
    with pytest.raises(UserError, match="gpu"):
        features.pick_device("gpu")


# --- Inception -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights of the network, in the names of torch-fidelity."""
    network = random_inception()
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    return path


def random_inception():
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as module
    except Exception as error:  # not installed, or with a torchvision for another torch
        pytest.skip(f"torch-fidelity: {error}")

    class Random(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__) -> None:
            """Keep what the layers were born with."""

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    return Random("random", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty)


def test_inception_features_are_those_of_torch_fidelity(inception_file, paths) -> None:
    network = random_inception()
    inputs.check_inception(inception_file)
    state = torch.get_rng_state()
    inception = InceptionFeatures(inception_file, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    found = extract(inception, paths[:3], Terminal(), "inception")
    levels = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] for path in paths[:3]]
    wanted = [network(item) for item in levels]
    assert found["features"] == pytest.approx(torch.cat([item[0] for item in wanted]).numpy(), rel=1e-4, abs=1e-6)
    assert found["logits"] == pytest.approx(torch.cat([item[1] for item in wanted]).numpy(), rel=1e-4, abs=1e-6)
    assert (found["features"].shape, found["logits"].shape) == ((3, 2048), (3, 1008))


def test_a_file_that_lacks_layers_is_refused(inception_file, tmp_path) -> None:
    tensors = safetensors.torch.load_file(inception_file)
    del tensors["Mixed_7c.branch1x1.conv.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"not the Inception of FID .*Missing key.*Mixed_7c") as caught:
        InceptionFeatures(tmp_path / "less.safetensors", "cpu")
    assert caught.value.exit_code == ExitCode.REFUSED


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"fc.weight": torch.zeros(1000, 2048)}, "its layer fc is 1000x2048, FID's 1008x2048"),
        ({"conv.weight": torch.zeros(3)}, "no layer fc in it"),
    ],
)
def test_another_network_is_refused_by_its_header(tensors, said, tmp_path) -> None:
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(UserError, match=said) as caught:
        inputs.check_inception(path)
    assert caught.value.exit_code == ExitCode.REFUSED


def test_without_its_library_it_says_what_to_install(tmp_path, monkeypatch) -> None:
    path = tmp_path / "inception.safetensors"
    safetensors.torch.save_file({"fc.weight": torch.zeros(1008, 2048)}, path)
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        inputs.check_inception(path)


def test_a_library_that_cannot_be_imported_is_an_error_in_a_line(tmp_path, monkeypatch) -> None:
    (tmp_path / "torch_fidelity").mkdir()
    (tmp_path / "torch_fidelity" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"cannot be imported \(operator torchvision::nms does not exist\)"):
        InceptionFeatures(tmp_path / "inception.safetensors", "cpu")


def test_a_pickle_is_not_read(tmp_path) -> None:
    with pytest.raises(UserError, match="pickle"):
        inputs.check_inception(tmp_path / "weights-inception-2015-12-05-6726825d.pth")
