"""Packaging of scbench: the top-level folders kernels/, ds_configs/ and suites/ install as parts of the package."""

from pathlib import Path

from setuptools import setup

setup(
    name="scbench",
    version="0.1.0",
    description="Pretrain and benchmark foundation models of single-cell transcriptomes",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[
        "scbench",
        "scbench.config",
        "scbench.data",
        "scbench.data.sources",
        "scbench.models",
        "scbench.models.encoders",
        "scbench.training",
        "scbench.evaluation",
        "scbench.evaluation.classification",
        "scbench.evaluation.compare",
        "scbench.evaluation.counts",
        "scbench.evaluation.demo",
        "scbench.evaluation.finetuning",
        "scbench.evaluation.masked",
        "scbench.evaluation.perturbation",
        "scbench.evaluation.suite",
        "scbench.kernels",
        "scbench.ds_configs",
        "scbench.suites",
    ],
    package_dir={
        "scbench": "scbench", "scbench.kernels": "kernels", "scbench.ds_configs": "ds_configs", "scbench.suites": "suites",
    },
    package_data={
        "scbench.data": ["gene_table/*"], "scbench.kernels": ["*.c", "*.h"], "scbench.ds_configs": ["*.json"],
        "scbench.suites": ["*.toml", "*.json"],
    },
    install_requires=[
        "torch>=2.13,<2.14",
        "triton==3.7.1; platform_system == 'Linux'",
        "deepspeed>=0.19.8,<0.20",
        "numpy>=2,<3",
        "scipy>=1.13,<2",
        "pandas>=2.2,<4",
        "h5py>=3.11,<4",
        "anndata>=0.12,<0.13",
        "zarr>=3.1,<4",
        "tensorstore>=0.1.86,<0.2",
        "google-crc32c>=1.6,<2",
        "pyarrow>=18",
        "safetensors>=0.5,<1",
        "scikit-learn>=1.6,<2",
        "threadpoolctl>=3.1",
        "matplotlib>=3.9,<4",
        "tensorboard>=2.18,<3",
        "tyro>=1.0,<2",
        "rich>=13",
    ],
    extras_require={
        "demo": ["scanpy>=1.11,<2"],
        "census": ["cellxgene-census>=1.17,<2"],  # for census: inputs of prepare
        "cuda": ["flash-attn>=2.8.3,<2.9"],  # attention in bf16 on CUDA; builds against an installed torch
        "scvi": ["scvi-tools>=1.4,<2"],  # for --scvi, a baseline of benchmark classification
        "test": ["pytest>=8", "hypothesis>=6", "scanpy>=1.11,<2", "jsonschema>=4.23", "ruff==0.17.6"],
    },
    entry_points={"console_scripts": ["scbench=scbench.cli:run"]},
    classifiers=["Programming Language :: Python :: 3.11", "Topic :: Scientific/Engineering :: Bio-Informatics"],
)
