"""Ships gin/ and configs/ inside the package, where an installed resmem finds them; all metadata is in pyproject.toml.

Beam takes this file too: --pipeline_options="--setup_file=./setup.py".
"""

from setuptools import setup

FOLDERS = {f"resmem_lm.{folder.replace('/', '.')}": folder for folder in ("configs", "gin", "gin/models", "gin/t5x")}

setup(
    packages=["beam_pipelines", "resmem_lm", "resmem_lm.studies", *FOLDERS],
    package_dir=FOLDERS,
    package_data={"resmem_lm": ["*.html", "py.typed"], **{folder: ["*.gin"] for folder in FOLDERS}},
)
