"""Compiles every Triton kernel for sm_90 ahead of time, without a GPU; fails on spills or too much shared memory."""
import sys
from pathlib import Path

KERNELS = Path(__file__).parent.parent / "flora" / "kernels" / "triton"


def main() -> int:
    if not KERNELS.exists():
        print("0 Triton kernels in flora/kernels/triton: nothing to compile. This version runs on PyTorch and the C++ operators.")
        return 0
    from flora.kernels.triton import aot
    return aot.main()


if __name__ == "__main__":
    sys.exit(main())
