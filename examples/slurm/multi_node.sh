#!/bin/bash
# Several nodes, one launcher on each, which starts a process per device and all again if one fails:
#
#     sbatch multi_node.sh train.py --epochs 3
#
# train.py as for single_node.sh. Expected output: that of train.py in slurm-<job>.out.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1        # the launcher; its processes share what the task has
#SBATCH --cpus-per-task=1
##SBATCH --gpus-per-node=8         # one # less where there are GPUs
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -eu

requeue() { echo "job $SLURM_JOB_ID goes back to the queue"; scontrol requeue "$SLURM_JOB_ID"; }
trap requeue USR1

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
endpoint=${MASTER_ADDR:-$first_node}:$((20000 + SLURM_JOB_ID % 40000))
restart=${SLURM_RESTART_COUNT:-0}

# SLURM_NODEID is another on each node, so each task has to read it.
srun bash -c 'exec python -m accelerator launch --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" "$@"' launcher \
    --rdzv-endpoint "$endpoint" --rdzv-id "$SLURM_JOB_ID-$restart" --max-restarts 3 "$@" &
wait $!
