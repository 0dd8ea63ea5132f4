"""The same drawing by OpenVINO (optimum-intel), in an environment of its own: it needs other versions than ours.

``python -m venv ov && ov/bin/pip install "optimum-intel[openvino]" diffusers``, then ``--openvino ov/bin/python``. Imports
nothing of the project. Static shapes; its default precision, which on a CPU with bf16 is bf16. Called once with "export",
which writes the model in its form, and once to draw.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

started = time.perf_counter()

from optimum.intel import OVStableDiffusionPipeline  # noqa: E402 - a part of loading

drawing = json.loads(sys.argv[1])
folder = Path(drawing["model"] + "-openvino")
if sys.argv[2:] == ["export"]:
    OVStableDiffusionPipeline.from_pretrained(drawing["model"], export=True, compile=False, load_in_8bit=False).save_pretrained(
        folder
    )
    sys.exit()
size_px = drawing["size_px"]
pipeline = OVStableDiffusionPipeline.from_pretrained(folder, compile=False)
pipeline.reshape(batch_size=drawing["batch_size"], height=size_px, width=size_px, num_images_per_prompt=1)
pipeline.compile()
pipeline.set_progress_bar_config(disable=True)
options = {"num_inference_steps": drawing["steps"], "guidance_scale": 7.5, "width": size_px, "height": size_px}
ends = [time.perf_counter()]
for _ in range(drawing["pictures"]):
    pipeline("a red circle on a white background", **options)
    ends.append(time.perf_counter())
status = Path("/proc/self/status").read_text(encoding="utf-8")
(peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
times = {"load_s": ends[0] - started, "first_s": ends[1] - ends[0], "next_s": ends[-1] - ends[-2]}
print(json.dumps(times | {"peak_bytes": int(peak) * 1024, "plan": f"OpenVINO {version('openvino')}"}))
