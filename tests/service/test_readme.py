from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import sample
from running import ROOT, Service

README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_walk_through_of_the_readme_works_as_it_stands(service: Service, tmp_path: Path) -> None:
    for path, data in sample.coloured(per_class=8, seed=700_000).items():
        target = tmp_path / "signs" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    script = "\necho\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    script = script.replace("127.0.0.1:8000", f"127.0.0.1:{service.port}")
    script, replaced = re.subn(r'(RECIPE=.*)"imagenet"', r'\1"random"', script)
    assert replaced == 1
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=360
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "event: fold" in done.stdout and "# VGG16" in done.stdout and "95 % interval" in done.stdout
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    fields = set(re.findall(r'"([a-z_]\w*)": ?', "\n".join(re.findall(r"^#> (.*)$", README, re.MULTILINE))))
    assert len(fields) > 20
    assert fields <= set(re.findall(r'"(\w+)":', done.stdout))
