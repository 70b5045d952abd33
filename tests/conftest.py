"""Settings of every test: where there is no CUDA device, Triton runs in its interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first `import triton`
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
