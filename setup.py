"""Ships gin/ and configs/ inside the package, where an installed resmem finds them; all metadata is in pyproject.toml.

Beam takes this file too: --pipeline_options="--setup_file=./setup.py".
"""

from setuptools import setup

setup(
    packages=["beam_pipelines", "resmem_lm", "resmem_lm.configs", "resmem_lm.gin", "resmem_lm.gin.models"],
    package_dir={"resmem_lm.configs": "configs", "resmem_lm.gin": "gin", "resmem_lm.gin.models": "gin/models"},
    package_data={"resmem_lm": ["*.html", "py.typed"], "resmem_lm.configs": ["*.gin"], "resmem_lm.gin.models": ["*.gin"]},
)
