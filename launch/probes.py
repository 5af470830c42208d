"""Small trials that ``pfc doctor`` runs, each in a process of its own: a crash or a hang there is an answer.

    python -m pfc.launch.probes dali|triton|gloo

Prints what it found, as one line, and exits 0; or ends with an exception.
"""

import os
import sys


def dali() -> str:
    """Decodes a JPEG with a DALI pipeline: on the GPU's decoder where there is a GPU, otherwise on the CPU."""
    import io

    import numpy as np
    import torch
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline
    from PIL import Image

    jpeg = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(jpeg, "JPEG")
    encoded = np.frombuffer(jpeg.getvalue(), np.uint8)
    gpu = torch.cuda.is_available()

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=0 if gpu else None)
    with pipeline:
        source = fn.external_source(lambda: [encoded], batch=True)
        pipeline.set_outputs(fn.decoders.image(source, device="mixed" if gpu else "cpu"))
    pipeline.build()
    (images,) = pipeline.run()
    image = np.array((images.as_cpu() if gpu else images).at(0))
    if image.shape != (16, 16, 3) or abs(int(image.mean()) - 200) > 2:
        raise RuntimeError(f"decoded to shape {image.shape} and mean {image.mean():.0f}, expected (16, 16, 3) and 200")
    return f"decodes JPEG on the {'GPU' if gpu else 'CPU'}"


def triton() -> str:
    """Runs a kernel: compiled where there is a GPU, otherwise in Triton's interpreter."""
    import torch

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"
    from .probe_kernel import add

    x = torch.arange(64, dtype=torch.float32, device="cuda" if gpu else "cpu")
    out = torch.empty_like(x)
    add[(1,)](x, x, out, 64)  # pyright: ignore[reportArgumentType]
    if not torch.equal(out, 2 * x):
        raise RuntimeError("the kernel's result is wrong")
    return "compiles for the GPU" if gpu else "runs in its interpreter (no GPU to compile for)"


def gloo() -> str:
    """An all-reduce between two processes of this machine."""
    from .rank import preload
    from .spawn import run_ranks

    preload("torch.distributed")
    if run_ranks(_gloo_rank, 2) != 0:
        raise RuntimeError("two processes could not exchange a number")
    return "two processes exchange tensors"


def _gloo_rank() -> None:
    """One of the two."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.ones(1)
    dist.all_reduce(value)
    dist.destroy_process_group()
    if value.item() != 2:
        raise RuntimeError(f"1 + 1 came back as {value.item()}")


if __name__ == "__main__":
    probes = {"dali": dali, "triton": triton, "gloo": gloo}
    if found := probes[sys.argv[1]]():
        print(found)
