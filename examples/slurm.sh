#!/bin/bash
#SBATCH --job-name=reward-model
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:SIGTERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110 # seconds from the signal until torchrun kills what has not ended
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-backend c10d \
    --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    -m btrm_core train --family llama3 --model /shared/llama3 --data /shared/pairs.jsonl --deepspeed zero3 \
    --output /shared/runs/llama3 --save-every 500 --resume &
run=$!
trap 'stopped=1; kill -TERM "$run"' TERM # Slurm signals this shell alone; srun passes it on to every torchrun
wait "$run"
code=$?
if [ -n "${stopped:-}" ]; then
    wait "$run" # the first wait was ended by the signal
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
