"""What a group of workers starts without, as nothing here uses it and every start would pay for it."""

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


def test_no_actor_of_ray_data_is_started():
    trainers = [kind(print, scaling_config=ScalingConfig()) for kind in (TorchTrainer, Trainer)]
    theirs, ours = ({type(one).__name__ for one in t._create_default_callbacks()} for t in trainers)
    assert theirs - ours == {"DatasetsCallback"}
