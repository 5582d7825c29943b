"""Distributed training on Ray and DeepSpeed."""
