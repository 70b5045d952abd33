"""krr_predict on one CPU thread beside the naive formula through autograd, both inside in float64.

    OMP_NUM_THREADS=1 python tests/bench_krr_predict.py  # half a minute; writes kernels/results/cpu_krr_predict.json

Forward and backward to f_s and y_s, with the constant feature; medians of 15 runs in CPU milliseconds.
"""

import datetime
import json
import platform
import statistics
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import torch  # noqa: E402

from kernels import krr_predict  # noqa: E402
from kernels.krr import krr_predict_ref, route  # noqa: E402

SIZES = ((100, 1024, 2048, 10), (100, 128, 8192, 512), (1000, 1024, 512, 10))  # m, n, d, c


def with_ones(x):
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def naive(f_t, f_s, y_s):
    return krr_predict_ref(with_ones(f_t).double(), with_ones(f_s).double(), y_s.double(), 1.0).float()


def ours(f_t, f_s, y_s):
    return krr_predict(f_t, f_s, y_s, 1.0, ones=True)


def milliseconds(predict, f_t, f_s, y_s) -> float:
    times = []
    for _ in range(18):
        start = time.process_time()
        torch.autograd.grad(predict(f_t, f_s, y_s).square().sum(), [f_s, y_s])
        times.append(1e3 * (time.process_time() - start))
    return round(statistics.median(times[3:]), 2)


def measure(m: int, n: int, d: int, c: int) -> dict:
    torch.manual_seed(0)
    f_t, f_s = torch.randn(n, d).relu(), torch.randn(m, d).relu().requires_grad_()
    y_s = torch.randn(m, c).requires_grad_()
    torch.testing.assert_close(ours(f_t, f_s, y_s), naive(f_t, f_s, y_s))
    times = {f.__name__: milliseconds(f, f_t, f_s, y_s) for f in (naive, ours)}
    return dict(m=m, n=n, d=d, c=c, route=route(m, n, d + 1, c)) | times


def main() -> None:
    torch.set_num_threads(1)
    rows = [measure(*size) for size in SIZES]
    report = dict(
        date=datetime.date.today().isoformat(), machine=platform.machine(), torch=torch.__version__, threads=1,
        unit="ms of CPU time, median of 15", rows=rows,
    )  # fmt: skip
    (REPO / "kernels/results/cpu_krr_predict.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(map(str, rows)))


if __name__ == "__main__":
    main()
