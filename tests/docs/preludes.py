"""Names that the code of a page uses and does not define: what the page says in words."""

from __future__ import annotations

_MODEL = """
import copy
import fxquant
import torch
from tests.tiny import calibrate as calibration, make_dit, make_pipeline
model = make_dit()
calibrate = calibration(model)
"""

_PIPE = """
pipe = make_pipeline(model)
calibrate = lambda: pipe(class_labels=[1, 2], num_inference_steps=3)
"""

PRELUDES = {
    "docs/architecture.md": f"{_MODEL}\nquantized = fxquant.compile(model, recipe='rtn-w8a8', calibrate=calibrate)\n",
    "docs/channel-rules.md": "",
    "docs/diffusers.md": """
import torch
from tests.tiny import inputs, make_dit, make_pipeline
from tests.test_two_experts import clip as generate, pipeline
make_pipeline(make_dit()).save_pretrained("dit")
make_pipeline(make_dit(layers=3)).save_pretrained("dit-3-blocks")
wan = pipeline()
from safetensors.torch import save_file
from tests.adapters.fluxes import MODEL, PROMPT as prompt, make_pipe
from tests.adapters.loras import lora
flux = make_pipe(MODEL)
save_file(lora(make_dit(layers=3)), "dit-style.safetensors")
save_file(lora(make_dit(layers=3), rank=2), "dit-sketch.safetensors")
save_file(lora(MODEL, targets=("to_q", "to_v")), "style.safetensors")
save_file(lora(MODEL, rank=8, targets=("to_q", "to_v", "proj_mlp")), "sketch.safetensors")
""",
    "docs/evaluation.md": """
import fxquant
from tests.evaluation.pipes import make_pipe, quantized_pipe as quantize
pipe, quantized_pipe = make_pipe(), quantize()
""",
    "docs/distributed.md": f"""{_MODEL}{_PIPE}
import os
os.environ |= {{"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}}
labels = [1, 2]
""",
    "docs/formats.md": _MODEL,
    "docs/inspect.md": f"""{_MODEL}
fxquant.save(fxquant.compile(model, recipe='ptq4dit-w4a8', calibrate=calibrate), "dit-w4a8")
""",
    "docs/inspector.md": _MODEL,
    "docs/lives.md": """
from safetensors.torch import save_file
from tests import lives
from tests.adapters.loras import lora
dit, _ = lives.dit()
pixart, pixart_call = lives.pixart()
sd3, sd3_call = lives.sd3()
flux, flux_call = lives.flux()
wan, wan_call = lives.wan()
cogvideox, cogvideox_call = lives.cogvideox()
for name in ("dit", "pixart", "sd3", "flux", "wan", "cogvideox"):
    original = globals()[name].transformer
    save_file(lora(original, targets=("to_q", "to_v"), size=0.3), f"{name}-style.safetensors")
    save_file(lora(original, rank=8, seed=1, targets=("to_q",), size=0.3), f"{name}-sketch.safetensors")
del original
""",
    "docs/questions.md": f"{_MODEL}{_PIPE}",
    "docs/scale.md": """
import fxquant
from tests.tiny import make_dit, make_pipeline
make_pipeline(make_dit()).save_pretrained("dit")
def calibrate_with(pipe):
    return lambda: pipe(class_labels=[1, 2], num_inference_steps=3)
""",
    "docs/search.md": _MODEL,
    "docs/speed.md": f"""{_MODEL}{_PIPE}
fxquant.save(fxquant.compile(model, recipe='rtn-w4a8', calibrate=calibrate), "dit-w4a8")
""",
    "docs/usage.md": f"""{_MODEL}{_PIPE}
pipe.transformer = fxquant.compile(model, recipe="rtn-w4a8", calibrate=calibrate)
""",
}
"""Code that runs before the blocks of a page, by page; pages without an entry define all names themselves."""

QUICKLY = {"docs/diffusers.md", "docs/lives.md"}
"""Pages whose calls of ``torch.compile`` without a backend trace only: the default backend takes a minute."""

ALIKE = {
    "docs/diffusers.md": {
        "Two experts",
        "Compiling in pieces",
    },  # As tests/test_two_experts.py and runtime/test_compiling.py.
    "docs/lives.md": {"PixArt-Sigma", "Stable Diffusion 3", "FLUX", "Wan 2.2", "CogVideoX"},
}
"""Sections that do what their page does with another model, or what other tests do; ``make test`` leaves them out."""
