"""What a group of workers starts without, as nothing here uses it and every start would pay for it."""

import os
import subprocess
import sys

from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from findrec.cluster.trainer import Trainer

IMPORT = """
import sys
from findrec.cluster.zero.deepspeed_patches import import_deepspeed
import_deepspeed()
assert "mlflow" not in sys.modules, "MLflow"
assert "torch._inductor.compile_fx" not in sys.modules, "Inductor"
import mlflow
"""


def test_deepspeed_brings_neither_mlflow_nor_the_compiler():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


PROBE = """
import deepspeed.ops

def refuse():
    raise AssertionError("DeepSpeed asks of all ops whether they could be built")

deepspeed.ops._probe_compatible_ops = refuse
from findrec.cluster.zero.deepspeed_patches import import_deepspeed
import_deepspeed()
from deepspeed.comm.torch import build_shm_op
assert build_shm_op() is None
assert not deepspeed.ops.__compatible_ops__["async_io"]
"""


def test_no_op_of_deepspeed_is_probed():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


DEVICE = """
import torch
torch.cuda.is_available = lambda: True
from findrec.cluster.zero.deepspeed_patches import import_deepspeed
import_deepspeed(torch.device("cpu"))
from deepspeed.accelerator import get_accelerator
assert get_accelerator()._name == "cpu"
"""


def test_a_worker_on_the_cpu_stays_there_beside_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_actor_of_ray_data_is_started():
    trainers = [kind(print, scaling_config=ScalingConfig()) for kind in (TorchTrainer, Trainer)]
    theirs, ours = ({type(one).__name__ for one in t._create_default_callbacks()} for t in trainers)
    assert theirs - ours == {"DatasetsCallback"}
