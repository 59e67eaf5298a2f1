"""An installed wheel finds the shipped configs and the tiny model outside the checkout."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

SHORT = ["--trainer.max_epochs=1", "--data.demonstrations.num_demonstrations=8", "--data.benchmarks=null"]


def run(*command, folder, **environment):
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(repository, tmp_path_factory):
    """Folder with the installed wheel, built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "installed"
    source.mkdir()
    for name in ("egspo_lightning", "configs"):
        shutil.copytree(repository / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    offline = ["--no-build-isolation"] if int(version("setuptools").split(".")[0]) >= 77 else []
    run("pip", "wheel", "--quiet", "--no-deps", *offline, "--wheel-dir", str(folder), str(source), folder=folder)
    (wheel,) = folder.glob("*.whl")
    run("pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel), folder=folder)
    return target


@pytest.mark.slow
def test_wheel_contains_every_config_the_files_of_the_report_and_the_type_stub(installed, repository):
    package, configs = installed / "egspo_lightning", repository / "configs"
    for path in [*configs.rglob("*.yaml"), *configs.glob("tiny_model/*.json")]:
        assert (package / "configs" / path.relative_to(configs)).read_bytes() == path.read_bytes()
    assets = repository / "egspo_lightning" / "analysis" / "report_assets"
    for path in assets.iterdir():
        assert (package / "analysis" / "report_assets" / path.name).read_bytes() == path.read_bytes()
    assert (package / "__init__.pyi").is_file()
    assert (package / "py.typed").is_file()


@pytest.mark.slow
def test_installed_package_finds_shipped_configs(installed, tmp_path):
    arguments = ["--config", "configs/quickstart.yaml", "--config=methods/grpo.yaml", "--print_config"]
    printed = run("egspo_lightning", "fit", *arguments, folder=tmp_path, PYTHONPATH=str(installed))
    config = yaml.safe_load(printed)
    assert config["model"]["gate"]["class_path"] == "egspo_lightning.OpenGate"
    assert config["trainer"]["max_epochs"] == 180


@pytest.mark.slow
def test_installed_package_runs_the_quickstart(installed, tmp_path):
    arguments = ["fit", "--config=configs/quickstart.yaml", *SHORT]
    assert "Logs:" in run("egspo_lightning", *arguments, folder=tmp_path, PYTHONPATH=str(installed))
    (saved,) = tmp_path.glob("logs/lightning_logs/version_0/config.yaml")
    name = yaml.safe_load(saved.read_text())["model"]["policy"]["name_or_path"]
    assert Path(name) == installed / "egspo_lightning" / "configs" / "tiny_model"
