#!/usr/bin/env bash
# The main job, as the platform starts it: bash run.sh [flags]. Its flags go to main.py, and main.py's exit status comes back.
# Installs nothing, exports no path, adds no flag: config.yaml, the platform's variables and your flags decide.

cd "${RUNTIME_SCRIPT_DIR:-$(dirname "$0")}" || exit 2

# Each variable is set only where it is unset (or empty).
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"  # lines appear when they are printed, also in a platform's log
# One thread a core that this process may use: libraries guess differently, and threads past the cores only wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)}"
export MALLOC_ARENA_MAX="${MALLOC_ARENA_MAX:-2}"  # glibc keeps freed memory for each thread: with many arenas a long run grows
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.tcache_count=0}"  # else small objects pin the holes between torch's blocks: twice the heap
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"  # batches vary in length: less fragmentation
export CUBLAS_WORKSPACE_CONFIG="${CUBLAS_WORKSPACE_CONFIG:-:4096:8}"  # cuBLAS gives the same sums in every run
export CUDA_DEVICE_ORDER="${CUDA_DEVICE_ORDER:-PCI_BUS_ID}"  # cuda:N means the device that nvidia-smi calls N
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"  # TensorBoard may import TensorFlow, which greets with warnings

# PYTHON names another interpreter; some systems have python3 only.
python="${PYTHON:-$(command -v python || command -v python3)}"
exec "${python:-python}" -u main.py "$@"
