"""Compiles a loop of ``add_product`` for a GPU and prints where each product begins: run by test_tile_sums.py.

It imports no torch, which would cost seconds, so the file of the function is loaded by its path.
"""

import importlib.util
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FILE = Path(__file__).parents[2] / "lizard_ops/tiles/sums.py"
spec = importlib.util.spec_from_file_location("sums", FILE)
assert spec is not None and spec.loader is not None
sums = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sums)
add_product = sums.add_product


@triton.jit
def loop_kernel(a, b, out, rows, steps, PRECISION: tl.constexpr):
    i = tl.arange(0, 32)
    tile = i[:, None] * 32 + i[None, :]
    acc = tl.zeros([32, 32], tl.float32)
    for step in range(steps):
        acc = add_product(
            acc, tl.load(a + step * 1024 + tile), tl.load(b + step * 1024 + tile), (i < rows)[:, None], PRECISION
        )
    tl.store(out + tile, acc)


def main() -> None:
    for precision in ("ieee", "tf32"):
        kinds = {"a": "*fp32", "b": "*fp32", "out": "*fp32", "rows": "i32", "steps": "i32", "PRECISION": "constexpr"}
        source = ASTSource(loop_kernel, kinds, {(5,): precision})
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
        (line,) = (line for line in code.splitlines() if "tt.dot" in line)
        begin = line.split("tt.dot")[1].split(":")[0].split(",")[2].strip()
        constants = [line for line in code.splitlines() if "arith.constant dense<0.0" in line]
        zero = any(line.split("=")[0].strip() == begin for line in constants)
        print(precision, "zero" if zero else "sum")


if __name__ == "__main__":
    main()
