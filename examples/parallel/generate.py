"""Makes a picture with a quantized class-conditional pipeline whose transformer is divided between ranks."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import fxquant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the quantized pipeline")
    parser.add_argument("--label", type=int, default=1, help="class of the picture")
    parser.add_argument("--steps", type=int, default=20, help="number of denoising steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--out", type=Path, default=Path("picture.png"), help="file of the picture")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group()
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    pipe = fxquant.load_pipeline(options.folder, device=device)
    whole = pipe.transformer.get_memory_footprint()
    pipe.transformer = fxquant.parallelize(pipe.transformer, mesh)
    part = pipe.transformer.get_memory_footprint()
    print(f"rank {mesh.get_local_rank()} holds {part:,} of {whole:,} bytes", flush=True)

    # All ranks make the same call with the same noise; each of them gets the whole picture.
    pipe.set_progress_bar_config(disable=mesh.get_local_rank() > 0)
    noise = torch.Generator().manual_seed(options.seed)
    image = pipe([options.label], num_inference_steps=options.steps, generator=noise).images[0]
    if mesh.get_local_rank() == 0:
        print(pipe.transformer.parallel.plan)
        image.save(options.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
