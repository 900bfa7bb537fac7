"""What Triton cannot say: CUDA C++ for GPUs of capability 9.0, compiled by NVIDIA's own library."""
