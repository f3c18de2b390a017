#!/bin/bash
# A run on several machines under Slurm, with one process for each GPU:
#
#   sbatch --nodes 2 --gpus-per-node 8 recipes/accelerate/slurm.sh zero2 \
#     recipes/tts.py --config recipes/configs/tts/paper.yaml
#
# The first argument is a file of recipes/accelerate, the others are the recipe's. Submit it in the
# repository's folder. This folder, .venv, the data and `out` must be on a file system that all
# machines share. Five minutes before the time limit the run saves a checkpoint and ends; the same
# command continues.
#SBATCH --job-name parlance
#SBATCH --ntasks-per-node 1
#SBATCH --exclusive
#SBATCH --signal TERM@300
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH"
# Other jobs on the first machine have other ports.
options=(
  --config_file "recipes/accelerate/$1.yaml"
  --num_machines "$SLURM_NNODES"
  --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE))
  --main_process_ip "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
  --main_process_port $((20000 + SLURM_JOB_ID % 10000))
)
# One task a machine. Its shell knows the machine's rank; without --cpus-per-task it has one core.
srun --cpus-per-task "$SLURM_CPUS_ON_NODE" --mpi none --kill-on-bad-exit \
  bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' - "${options[@]}" "${@:2}"
