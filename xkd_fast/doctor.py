"""What this machine has of what XKD uses: found, missing or broken, and what follows from it; and which shards are damaged.

Every look is taken in a process of its own, so that a package that crashes or writes to the terminal as it is imported costs
only its own line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

SECONDS = 120  # one look takes no longer
SHOWN_PROBLEMS = 20  # of shards, and of samples, that are printed

Status = Literal["found", "missing", "broken"]


@dataclass(frozen=True)
class Check:
    """One look: ``program`` returns a sentence, or raises ``LookupError`` or ``ImportError`` where there is nothing."""

    name: str
    program: str  # body of a function
    otherwise: str  # what follows where it is missing, and what to do


@dataclass(frozen=True)
class Finding:
    """The outcome of one look."""

    name: str
    status: Status
    detail: str  # version and the like; the error where broken
    consequence: str  # empty where found


CHECKS = (
    Check("Python", "import platform, os; return f'{platform.python_version()}, {os.cpu_count()} processors'", ""),
    Check(
        "PyTorch",
        "import torch; return f'{torch.__version__}, CUDA ' + (torch.version.cuda or 'not built in')",
        "nothing runs; install it: pip install torch",
    ),
    Check(
        "GPU",
        "import torch\n"
        "if not torch.cuda.is_available(): raise LookupError\n"
        "gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]\n"
        "return '; '.join(f'{g.name}, {g.total_memory / 2**30:.0f} GiB, sm_{g.major}{g.minor}' for g in gpus)",
        "everything runs on the CPU, which is enough for the demo and the tests, not for pretraining",
    ),
    Check(
        "DALI",
        "import nvidia.dali; return nvidia.dali.__version__",
        "no training, no evaluation: shards cannot be decoded; pip install 'xkd-fast[cuda13]' (CUDA 13, or no GPU) or "
        "'xkd-fast[cuda12]' (CUDA 12)",
    ),
    Check(
        "DeepSpeed",
        "import os, torch\n"
        "if not torch.cuda.is_available(): os.environ['DS_ACCELERATOR'] = 'cpu'\n"
        "import deepspeed; return deepspeed.__version__",
        "no training; install it after torch: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
    ),
    Check(
        "C++ compiler",
        "import os, shutil, subprocess\n"
        "path = shutil.which(os.environ.get('CXX', 'c++'))\n"
        "if path is None: raise LookupError\n"
        "return subprocess.run([path, '--version'], capture_output=True, text=True).stdout.splitlines()[0]",
        "no training on the CPU: DeepSpeed compiles its communication at first use; install g++ (Debian: apt install g++)",
    ),
    Check(
        "ninja",
        "import shutil, subprocess\n"
        "path = shutil.which('ninja')\n"
        "if path is None: raise LookupError\n"
        "return subprocess.run([path, '--version'], capture_output=True, text=True).stdout.strip()",
        "DeepSpeed cannot compile: pip install ninja, and put the environment's bin on the PATH (activate it)",
    ),
    Check(
        "Python headers",
        "import os, sysconfig\n"
        "path = os.path.join(sysconfig.get_path('include'), 'Python.h')\n"
        "if not os.path.exists(path): raise LookupError\n"
        "return path",
        "DeepSpeed cannot compile; install them (Debian: apt install python3-dev)",
    ),
    Check(
        "PyAV, FFmpeg",
        "import av\n"
        "needed = {'libx264': 'w', 'h264': 'r', 'mjpeg': 'w', 'libvpx-vp9': 'w', 'flac': 'w', 'aac': 'w'}\n"
        "lacking = []\n"
        "for name, mode in needed.items():\n"
        "    try: av.codec.Codec(name, mode)\n"
        "    except Exception: lacking.append(name)\n"
        "versions = [name + ' ' + '.'.join(map(str, av.library_versions[name])) for name in ('libavcodec', 'libavformat')]\n"
        "libraries = ', '.join(versions)\n"
        "if lacking: raise RuntimeError(f'{libraries} without the codecs ' + ', '.join(lacking))\n"
        "return f'{av.__version__}, {libraries}'",
        "no `xkd-fast prepare` or `render`: pip install av",
    ),
    Check(
        "scikit-learn",
        "import sklearn; return sklearn.__version__",
        "no `xkd-fast evaluate`: pip install scikit-learn",
    ),
    Check(
        "Triton",
        "import triton; return triton.__version__",
        "optional: model.compile must stay false on a GPU; it comes with PyTorch built for CUDA",
    ),
    Check(
        "Compiled operators",
        "import torch\n"
        "from xkd_kernels import native\n"
        "kinds = ('cpu', 'cuda') if torch.cuda.is_available() else ('cpu',)\n"
        "lacking = [native.missing(kind) for kind in kinds if native.missing(kind)]\n"
        "if len(lacking) == len(kinds): raise LookupError\n"
        "there = ' and '.join(kind for kind in kinds if not native.missing(kind))\n"
        "return f'for {there}' + ''.join(f'; {why}' for why in lacking)",
        "the optimiser's step runs by PyTorch's operators, which is slower; install this project again with cmake and a C++ "
        "compiler (for a GPU: nvcc) on the PATH",
    ),
    Check(
        "xformers",
        "import torch, xformers, xformers.ops\n"
        "if not torch.cuda.is_available(): return f'{xformers.__version__}; it has no operator for the CPU'\n"
        "x = torch.zeros(1, 64, 4, 64, device='cuda', dtype=torch.float16)\n"
        "xformers.ops.memory_efficient_attention(x, x, x); return f'{xformers.__version__}, attention works'",
        "optional: its attention cannot be chosen or compared with",
    ),
    Check(
        "apex",
        "import apex\n"
        "try: import amp_C\n"
        "except ImportError: raise RuntimeError('this is not NVIDIA apex with its CUDA extensions; '\n"
        "    'the apex of the package index is another project') from None\n"
        "return 'with CUDA extensions'",
        "optional: its fused optimiser cannot be compared with; it is built from NVIDIA's source",
    ),
    Check(
        "TensorBoard",
        "import tensorboard; return tensorboard.__version__",
        "set log.tensorboard=false, or pip install tensorboard",
    ),
    Check(
        "Weights & Biases", "import wandb; return wandb.__version__", "optional: log.wandb must stay false; pip install wandb"
    ),
)


def examine(checks: Sequence[Check] | None = None) -> list[Finding]:
    """Take every look (``CHECKS`` unless told otherwise), two at a time; never raises for what it finds."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(_look, CHECKS if checks is None else checks))


def _look(check: Check) -> Finding:
    body = "\n".join(f"    {line}" for line in check.program.splitlines())
    program = (
        f"def look():\n{body}\n"
        "import json\n"
        "try: answer = ('found', look())\n"
        "except ModuleNotFoundError as error: answer = ('missing', str(error))\n"
        "except LookupError: answer = ('missing', '')\n"
        "except BaseException as error: answer = ('broken', f'{type(error).__name__}: {error}')\n"
        "print('\\n' + json.dumps(answer))\n"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    try:
        run = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS, env=environment, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return Finding(check.name, "broken", f"gave no answer within {SECONDS} s", check.otherwise)
    try:
        status, detail = json.loads(run.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return Finding(check.name, "broken", f"the process ended with code {run.returncode}", check.otherwise)
    if status == "missing":
        return Finding(check.name, "missing", "", check.otherwise)
    return Finding(check.name, status, " ".join(str(detail).split())[:300], "" if status == "found" else check.otherwise)


def check_shards(folders: Sequence[str], *, as_json: bool) -> int:
    """Read every sample of these folders, print which shards are broken and which samples damaged, and return the exit code.

    A sample is named FOLDER/KEY: keys are a folder's own.

    Raises:
        UserError: a folder is no shard set.
    """
    from rich.console import Console
    from rich.progress import track

    from xkd_fast.data.shards import ShardSet
    from xkd_fast.data.storage import shown

    broken: list[str] = []
    sets = {shown(folder): ShardSet.open(folder, broken=broken) for folder in folders}
    samples = [(folder, index) for folder, shards in sets.items() for index in range(len(shards))]
    damaged: dict[str, list[str]] = {}
    for folder, index in track(samples, "reading samples", console=Console(stderr=True)):
        found = [str(error) for error in sets[folder].damage(index)]
        if found:
            damaged[f"{folder}/{sets[folder].keys[index]}"] = found
    if as_json:
        print(json.dumps({"samples": len(samples), "damaged": damaged, "broken_shards": broken}, indent=2))
    else:
        for reasons in (broken, [reason for found in damaged.values() for reason in found]):
            print(*reasons[:SHOWN_PROBLEMS], sep="\n", end="\n" if reasons else "")
            if len(reasons) > SHOWN_PROBLEMS:
                print(f"and {len(reasons) - SHOWN_PROBLEMS} more like these; --json lists all")
        print(f"{len(samples)} samples read, {len(damaged)} damaged" + (f"; {len(broken)} shards broken" if broken else ""))
        if damaged or broken:
            print("copy their shards again; or delete these .tar files and call the same prepare of this version again")
    return 1 if damaged or broken else 0
