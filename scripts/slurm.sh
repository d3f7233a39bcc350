#!/usr/bin/env bash
# Several machines under Slurm: one torchrun on each, which starts a process for each GPU.
#   sbatch --nodes 2 scripts/slurm.sh scripts/configs/llama3_8b_instruct_pairrm.yaml --gradient_accumulation_steps 2 --hsdp \
#       --output_dir /shared/runs/first --cache_dir /shared/cache
# After a failure the same line with --resume at its end continues from the newest checkpoint (--save_steps).
#SBATCH --job-name tgdpo
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 32
#SBATCH --time 24:00:00
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"   # the project's directory, with its .venv, on a file system that all machines share
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit 1 --cpus-per-task "$SLURM_CPUS_PER_TASK" .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$head:29500" tgdpo.py "$@"
