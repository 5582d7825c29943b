#!/usr/bin/env bash
# Not run here: an example to start from. One Ray process on each node, then the job on the first one.
#   sbatch cluster/slurm.sh configs/complete-journey.yaml cluster.workers=2
#SBATCH --job-name=findrec
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=08:00:00
#SBATCH --signal=B:INT@120
# With GPUs add:  #SBATCH --gpus-per-node=4   and cluster.workers=8 training.microbatches=8
# (the number of workers divides that of microbatches)
set -euo pipefail

config=${1:?usage: sbatch cluster/slurm.sh CONFIG [dotted.key=value ...]}
shift

cd "$SLURM_SUBMIT_DIR" # the checkout, on a file system that all nodes see
source .venv/bin/activate
export FINDREC_HOME=${FINDREC_HOME:-$SLURM_SUBMIT_DIR}
export RAY_AUTH_MODE=disabled # the nodes of one allocation; use a token on a network you do not trust

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs may share a node
address=$head:$port

srun --nodes=1 --ntasks=1 -w "$head" \
    ray start --head --port="$port" --num-cpus="$SLURM_CPUS_PER_TASK" --block &
sleep 20
if ((SLURM_JOB_NUM_NODES > 1)); then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
        ray start --address="$address" --num-cpus="$SLURM_CPUS_PER_TASK" --block &
    sleep 20
fi

# MLflow's sqlite file is refused on more than one node: name a server, or switch the mirror off.
tracking=tracking.enabled=false
if [[ -n ${MLFLOW_TRACKING_URI:-} ]]; then tracking=tracking.uri=$MLFLOW_TRACKING_URI; fi

# In the background: bash passes the signal on only while it waits. Two minutes before the end Slurm
# interrupts the job, which leaves a run that the same sbatch command continues.
RAY_ADDRESS=$address python -m findrec.train_dist --config "$config" "$tracking" "$@" &
job=$!
trap 'kill -INT "$job"' INT
wait "$job" || wait "$job"
