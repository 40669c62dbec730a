"""Ships gin/ and configs/ inside the package, where an installed resmem finds them; all metadata is in pyproject.toml.

Beam takes this file too: --pipeline_options="--setup_file=./setup.py".
"""

from setuptools import find_packages, setup

FOLDERS = {f"resmem_lm.{folder.replace('/', '.')}": folder for folder in ("configs", "gin", "gin/models", "gin/t5x")}

setup(
    packages=[*find_packages(include=["beam_pipelines", "resmem_lm*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={"resmem_lm": ["report/*.html", "py.typed"], **{folder: ["*.gin"] for folder in FOLDERS}},
)
