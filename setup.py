"""What to install; name and requirements stand in pyproject.toml, the version in xkd_fast/__init__.py."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["xkd_fast", "xkd_fast.*"]), "xkd_fast.configs", "xkd_kernels"],
    # The wheel carries configs/ inside the package; a checkout reads the folder at the top (xkd_fast.config.shipped_configs).
    package_dir={"xkd_fast.configs": "configs", "xkd_kernels": "kernels/xkd_kernels"},
    package_data={"xkd_fast": ["py.typed"], "xkd_fast.configs": ["*.yaml", "*.json"], "xkd_kernels": ["py.typed", "*.json"]},
)
