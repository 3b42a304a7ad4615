"""The wheel is whole: installed elsewhere, it has its templates and both ways to be called."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.timeout(300)
def test_a_wheel_works_on_its_own(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, timeout=200)
    wheel = next(tmp_path.glob("slurmfork-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {"slurmfork/templates/sbatch.sh.j2", "slurmfork/templates/local.sh.j2", "slurmfork/py.typed"} <= set(names)
    place = tmp_path / "venv"
    venv.create(place, with_pip=False)
    site = next(place.glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    ours = next(entry for entry in sys.path if entry.endswith("site-packages"))
    (site / "dependencies.pth").write_text(ours + "\n")  # what it depends on, not the package itself
    code = "import slurmfork, sys; print(slurmfork.__file__); from slurmfork.cli.main import main; sys.exit(main())"
    argv = [str(place / "bin" / "python"), "-I", "-c", code, "render", str(ROOT / "docs" / "examples" / "grpo.yaml")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(place)), "the installed package was used, not the checkout"
    assert "#SBATCH --gpus-per-node=8" in done.stdout
