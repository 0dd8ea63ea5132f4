"""The laws of the layout, read from the sources: who may import whom, how long a file is, who may write."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))

# A file imports only files above it in this list; so no circle can exist. Up to the line nothing imports torch.
LIGHT = [
    "version", "errors", "config", "train_config", "finetune_config", "strict_yaml", "quiet", "files", "folders", "checkpoints", "processes", "devices",
    "tensor_files", "images", "prompts", "captions", "prepared_folder", "buckets", "augmentation", "dataset", "recipe_dialects", "recipe", "jobs", "schedulers",
    "request", "named_files", "model_files", "model_shapes", "unet_weights", "memory_prediction", "memory_plan", "plan_report",
    "measured_peaks", "model_source", "downloads", "estimate", "terminal",
    "doors", "session", "flags", "arguments", "orders", "recipe_orders", "unet_parts", "training_memory", "training_plan", "saved_datasets", "training_start", "train_arguments", "finetune_arguments", "lean_imports",
]  # fmt: skip
HEAVY = [
    "scenes", "quantization", "native", "cpu_kernels", "cpu_memory", "cpu_layers", "optimizations", "model_weights", "base_models", "conditioning",
    "guidance_interval", "step_cache", "token_merging", "any_latents", "denoising", "lora", "memory_ladder",
    "drawn_recipe", "generator", "report", "preparation",
    "diffusion", "training", "example_subject", "evaluation", "scratch",
]  # fmt: skip
DOORS = ["cli", "prepare_dataset", "train_lora", "finetune", "evaluate", "bench"]
ORDER = [*LIGHT, *HEAVY, *DOORS]
HEAVY_PACKAGES = {"torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy", "scipy", "xformers"}
# Imported lazily on purpose, where the arrow points down: config reads YAML only when there is a file; the door opens its room.
LAZY = {("config", "strict_yaml"), ("cli", "generator")}
MAX_LINES, MAX_FUNCTION_LINES = 400, 60
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc", "base", "manager"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, module_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports; ``from src import files`` counts as src.files. TYPE_CHECKING blocks do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    nodes = list(ast.walk(tree))
    if module_level_only:
        inner = {
            id(child) for item in nodes if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)) for child in ast.walk(item)
        }
        nodes = [item for item in nodes if id(item) not in inner]
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {item.name for item in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{item.name}" for item in node.names} if node.module == "src" else {node.module}
    return names


def test_every_file_stands_in_the_order() -> None:
    known = set(ORDER)
    unknown = [name_of(path) for path in SOURCES if path.name != "__init__.py" and name_of(path).split(".")[0] not in known]
    assert unknown == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_up(path: Path) -> None:
    name = name_of(path).split(".")[0]
    if not name or path.name == "__init__.py":
        return
    mine = {item.split(".")[1] for item in imports(path) if item.startswith("src.")} - {name}
    late = {item for item in mine if ORDER.index(item) >= ORDER.index(name) and (name, item) not in LAZY}
    assert late == set(), f"{name} imports what stands below it"
    assert not (mine & set(DOORS)), "doors are imported by main.py alone"


@pytest.mark.parametrize("name", LIGHT)
def test_light_files_import_nothing_heavy(name: str) -> None:
    packages = {item.split(".")[0] for item in imports(ROOT / "src" / f"{name}.py", module_level_only=True)}
    assert (
        packages & (HEAVY_PACKAGES | {"huggingface_hub", "tqdm", "yaml"} - ({"yaml"} if name == "strict_yaml" else set()))
        == set()
    )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_names_say_what_a_file_knows(path: Path) -> None:
    assert path.stem not in FORBIDDEN_NAMES


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_two_files_write_and_nothing_is_unpickled(path: Path) -> None:
    writers, forbidden = [], []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        words = [item.value for item in ast.walk(node) if isinstance(item, ast.Constant) and isinstance(item.value, str)]
        modes = [word for word in words if re.fullmatch(r"[rwxabt+]{1,4}", word)]
        opens = called == "os.open" or (called.split(".")[-1] == "open" and any(set(mode) & set("wax+") for mode in modes))
        if opens or called.endswith(("write_text", "write_bytes", "save_file", "save_pretrained")):
            writers.append(called)
        if called in {"eval", "exec", "torch.load", "yaml.load", "pickle.load", "pickle.loads", "os.system"}:
            forbidden.append(called)
        if any(k.arg == "shell" and ast.unparse(k.value) == "True" for k in node.keywords):
            forbidden.append("shell=True")
    assert forbidden == []
    assert writers == [] or name_of(path) in {
        "files",
        "folders",
        "bench.openvino_side",
    }  # a file; a folder and its lock; elsewhere


def test_diffusers_and_peft_stay_in_their_rooms() -> None:
    rooms = {
        "diffusers": {
            "base_models",
            "model_weights",
            "lean_imports",
            "schedulers",
            "optimizations",
            "any_latents",
            "denoising",
            "generator",
            "lora",
            "training",
            "scratch",
            "bench",
            "cpu_kernels",
            "cpu_layers",
        },
        "peft": {"training", "bench"},
    }
    for package, allowed in rooms.items():
        users = {
            name_of(path).split(".")[0] for path in SOURCES if any(item.split(".")[0] == package for item in imports(path))
        }
        assert users <= allowed
