"""The fused operations of the models, one a file: a public function, its gradients, and a plain PyTorch oracle beside it.

Installed as `scbench.kernels`; nothing here imports the rest of scbench.
"""
