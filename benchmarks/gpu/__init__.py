"""Benchmarks that need a GPU, see QUEUE.md."""
