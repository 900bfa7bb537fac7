"""Tensor parallelism: how the ranks of one engine find each other, keep step and add up what they compute."""
