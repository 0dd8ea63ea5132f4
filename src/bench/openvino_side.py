"""The same drawing by OpenVINO (optimum-intel), in an environment of its own: it needs other versions than ours.

``python -m venv ov && ov/bin/pip install "optimum-intel[openvino]" diffusers``, then ``--openvino ov/bin/python``. Imports
nothing of the project. Static shapes; its default precision, which on a CPU with bf16 is bf16. Export counts as loading.
"""

import json
import resource
import sys
import time

started = time.perf_counter()

from optimum.intel import OVStableDiffusionPipeline  # noqa: E402 - a part of loading

drawing = json.loads(sys.argv[1])
pipeline = OVStableDiffusionPipeline.from_pretrained(drawing["model"], export=True, compile=False, load_in_8bit=False)
size_px = drawing["size_px"]
pipeline.reshape(batch_size=drawing["batch_size"], height=size_px, width=size_px, num_images_per_prompt=1)
pipeline.compile()
pipeline.set_progress_bar_config(disable=True)
ends = [time.perf_counter()]
for _ in range(drawing["pictures"]):
    pipeline(
        "a red circle on a white background",
        num_inference_steps=drawing["steps"],
        guidance_scale=7.5,
        width=size_px,
        height=size_px,
    )
    ends.append(time.perf_counter())
peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
times = {"load_s": ends[0] - started, "first_s": ends[1] - ends[0], "next_s": ends[-1] - ends[-2], "peak_bytes": peak_bytes}
print(json.dumps(times))
