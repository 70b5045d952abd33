"""Settings of every test: where there is no CUDA device, Triton runs in its interpreter. `refuse`, `clean_record`."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first `import triton`
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

from common.run import UserError  # noqa: E402  (after Triton's switch)
from kernels import raise_if_failed  # noqa: E402


def refuse(call, *words):
    """Asserts a one-line UserError with these words; returns the line."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line
    return line


@pytest.fixture
def clean_record():
    """A seeded test that starts without a noted failure of the ridge, and leaves none unread."""
    torch.manual_seed(0)
    raise_if_failed(0)
    yield
    raise_if_failed(0)
