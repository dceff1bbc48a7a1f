"""The parts of ``benchmarks/gpu.py``. Each one runs in a process of its own."""
