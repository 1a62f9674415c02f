"""`python -m scbench`, which is also what the deepspeed launcher starts."""

from scbench.cli import run

run()
