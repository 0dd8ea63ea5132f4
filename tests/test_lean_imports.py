"""main.py imports less than the libraries want to, draws the same, and leaves nothing false behind."""

import json
import subprocess
import sys

import pytest

from src import lean_imports
from src.config import PROJECT_FOLDER, OptimizationConfig
from src.lean_imports import HIDDEN, STOOD_IN_FOR

DRAW = """
import contextlib, json, sys
from src import lean_imports, quiet
from src.config import AppConfig, OptimizationConfig

quiet.silence_libraries()
with lean_imports.for_drawing(OptimizationConfig(enable_torch_compile=sys.argv[1] == "whole")):
    from src.generator import TextToImageGenerator
config = AppConfig()
config.model.model_id, config.model.precision, config.model.device = "embedded", "fp32", "cpu"
generator = TextToImageGenerator(config, lambda line: None)
config.optimization.enable_torch_compile = False
pictures = [
    generator.generate("a red circle", seed=1, num_inference_steps=2, scheduler=name, **more)[0]
    for name, more in (("dpm++_2m_karras", {}), ("euler_a", {}), ("dpm++_2m", {"width": 64, "height": 64}))
]
from PIL import Image
start = Image.linear_gradient("L").resize((128, 128))
for mask in (None, start):
    options = {"init_image": start.convert("RGB"), "mask_image": mask, "seed": 1, "num_inference_steps": 4}
    pictures += generator.generate("a red circle", **options)
is_lean = isinstance(sys.modules.get("torch._dynamo"), lean_imports._StandIn)
held = [name for name in sys.argv[2:] if name in sys.modules and name != "torch._dynamo"]
pictures.append(generator.generate("a red circle", seed=1, num_inference_steps=2, scheduler="lms")[0])  # needs scipy.integrate
pictures.append(generator.generate("a red circle", seed=1, num_inference_steps=2, scheduler="euler_beta")[0])  # scipy.stats
import scipy.optimize
scipy.optimize.linear_sum_assignment([[1, 2], [2, 1]])
import torch.distributed.tensor
torch.distributed.tensor.DTensor.from_local
import peft
print(json.dumps({"held": held, "pictures": [picture.tobytes().hex() for picture in pictures], "peft": peft.__name__, "is_lean": is_lean}))
"""


def draw(kind: str) -> dict:
    command = [sys.executable, "-c", DRAW, kind, *STOOD_IN_FOR, *HIDDEN]
    done = subprocess.run(command, cwd=PROJECT_FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_lean_process_draws_the_same_and_what_it_left_out_can_still_be_imported() -> None:
    lean, whole = draw("lean"), draw("whole")
    if not lean["is_lean"]:
        pytest.skip("with these versions and packages all is imported")
    assert lean["held"] == []
    assert whole["held"] != []
    assert lean["pictures"] == whole["pictures"]


def test_a_process_that_imported_torch_or_compiles_or_has_other_versions_imports_all(monkeypatch) -> None:
    monkeypatch.setattr(lean_imports, "UNTRIED", ())
    assert not lean_imports._can_be_lean(OptimizationConfig())  # torch is imported here
    monkeypatch.delitem(sys.modules, "torch")
    if not all(lean_imports.version(name).partition("+")[0] == tested for name, tested in lean_imports.TESTED.items()):
        pytest.skip("these versions are imported whole")
    assert lean_imports._can_be_lean(OptimizationConfig())
    assert not lean_imports._can_be_lean(OptimizationConfig(enable_torch_compile=True))
    assert not lean_imports._can_be_lean(OptimizationConfig(quantize="int8"))
    monkeypatch.setenv(lean_imports.WHOLE, "1")
    assert not lean_imports._can_be_lean(OptimizationConfig())
    monkeypatch.delenv(lean_imports.WHOLE)
    monkeypatch.setitem(lean_imports.TESTED, "diffusers", "0.1")
    assert not lean_imports._can_be_lean(OptimizationConfig())


def test_a_stand_in_is_a_class_and_a_decorator_and_refuses_to_be_more(monkeypatch) -> None:
    module = lean_imports._Finder().create_module(lean_imports._Finder().find_spec("torch._dynamo.eval_frame"))
    assert lean_imports._Finder().find_spec("torch._dynamo2") is None

    def function() -> int:
        return 3

    assert module.disable(function, recursive=False)() == 3
    assert not isinstance(function, module.OptimizedModule.inner)
    with pytest.raises(RuntimeError, match="SD_IMPORT_WHOLE"):
        module.optimize()
    with pytest.raises(AttributeError):
        module.__wrapped__  # noqa: B018
    monkeypatch.setattr(lean_imports._Kind, "is_import", True)
    assert module.disable(recursive=False)(function)() == 3
