"""The chip, driver, versions, date and command that every result file carries."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import date

import torch
import triton


def environment() -> dict[str, str]:
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.split("\n")[0]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    try:
        import fla

        versions["fla-core"] = fla.__version__
    except ImportError:
        pass
    command = shlex.join(["python", *sys.argv])
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "date": str(date.today()),
        "command": command,
    } | versions
