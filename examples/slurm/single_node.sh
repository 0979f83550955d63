#!/bin/bash
# One node, one task per device, started by SLURM itself. Ends in time, and goes on from the newest checkpoint:
#
#     sbatch single_node.sh train.py --epochs 3
#
# train.py calls accelerator.resume() after prepare() and accelerator.save_state() now and then. Expected output: that of
# train.py in slurm-<job>.out, which goes on after a requeue.
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
##SBATCH --gpus-per-task=1         # one # less where there are GPUs
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120        # to this script, two minutes before its time is up
#SBATCH --requeue
#SBATCH --open-mode=append
set -eu

requeue() { echo "job $SLURM_JOB_ID goes back to the queue"; scontrol requeue "$SLURM_JOB_ID"; }
trap requeue USR1

export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
srun python -u "$@" &              # in the background, since bash runs a trap only while it waits
wait $!
