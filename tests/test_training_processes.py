"""Several processes: what two learn together is what one learns with twice the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.tiny import training

ROOT = Path(__file__).parent.parent


def test_two_processes_learn_what_one_does_with_twice_the_batch(tmp_path: Path) -> None:
    data, base = training.photos(tmp_path / "photos", count=6), training.model(tmp_path / "model")
    settings = ["--max_steps", "3", "--lr", "1e-2", "--gradient_accumulation", "2", "--checkpoint_steps", "3"]
    assert training.run(data, base, tmp_path / "one", *settings, "--batch_size", "2") == 0

    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
                "-m", "src.train_lora"]  # fmt: skip
    mine = ["--dataset_dir", str(data), "--model", str(base), "--output_dir", str(tmp_path / "two"), "--device", "cpu",
            "--resolution", str(training.SIZE_PX), "--mixed_precision", "no", "--batch_size", "1",
            "--set", f"paths.cache={tmp_path / 'cache'}"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*launcher, *mine, *settings], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stderr.count("adapter rank 4") == 1, "only one process speaks"

    one, two = (training.state(tmp_path / name / "checkpoint-3") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if name.startswith("adapter/"):
            torch.testing.assert_close(tensor, two[name], atol=1e-4, rtol=1e-3)
    assert any(tensor.abs().max() > 5e-3 for name, tensor in one.items() if name.endswith(".up"))
