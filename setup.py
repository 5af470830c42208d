"""Build and installation of pfc: the four top-level folders become one namespace, ``pfc``."""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ("partial_fc", "data", "engine", "launch")

# data/ is installed as pfc.data, and so on: the tree stays flat, and nothing called "data" lands in site-packages.
packages = [f"pfc.{name}" for room in ROOMS for name in (room, *(f"{room}.{sub}" for sub in find_packages(room)))]

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
    package_dir={f"pfc.{room}": room for room in ROOMS},
    package_data={"": ["**/*.html", "**/*.css", "**/*.yaml", "**/*.sbatch"]},
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
        "nvidia-dali-cuda130; sys_platform == 'linux'",
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
        "export": ["onnx", "onnxruntime", "onnxscript"],
        "dev": ["pytest", "hypothesis", "ruff", "pyright[nodejs]", "build", "setuptools>=77", "wheel"],
    },
    entry_points={"console_scripts": ["pfc = pfc.launch.cli:main"]},
)
