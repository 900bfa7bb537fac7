"""The GPU's kernels one by one, each against what limits it, measured in the same run.

    python scripts/bench/kernels.py [--only KIND] [--block-sizes N ...] [--sweep] [--json PATH]

Device time alone, by replays of CUDA graphs whose launches read different data, so that nothing is found
in the L2 cache that a model's layers would not find there. --sweep times the kernels' tile sizes, warps,
stages and splits instead.
"""

from __future__ import annotations

import sys

import torch
from harness import ROOT, BenchError
from harness.report import Report, make_parser, progress, run

sys.path.insert(0, str(ROOT))

KINDS = ("attention", "products", "packed", "sampling", "elementwise")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", choices=KINDS, help="one kind of kernel; all by default")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 64, 128], metavar="N")
    parser.add_argument("--sweep", action="store_true", help="find the fastest ways to build a kernel")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise BenchError("there is no GPU here")
    from gpu import attention, attention_sweep, elementwise, limits, packed, products, sampling

    report = Report("Kernels against the limits of the GPU", options)
    progress("limits")
    limit = limits.measure()
    report.data["limits"] = {"read_bytes_per_s": limit.read, "product_operations_per_s": limit.product}
    report.add_note(
        f"limits: memory read {limit.read / 1e12:.2f} TB/s, "
        f"bf16 matrix product {limit.product / 1e12:.0f} TFLOP/s"
    )
    if options.only in (None, "attention"):
        kind = attention_sweep if options.sweep else attention
        kind.add_tables(report, limit, options.block_sizes)
    if options.only in (None, "products"):
        (products.add_sweep if options.sweep else products.add_tables)(report, limit)
        if not options.sweep:
            products.add_wide_table(report, limit)
    if options.only in (None, "packed") and not options.sweep:
        packed.add_tables(report, limit)
    if options.only in (None, "sampling") and not options.sweep:
        sampling.add_tables(report, limit)
    if options.only in (None, "elementwise") and not options.sweep:
        elementwise.add_tables(report, limit)
    report.finish()


if __name__ == "__main__":
    run(main)
