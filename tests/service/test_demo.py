"""What the demo shows of numbers and of several labels; that it starts a service itself is tried with classes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import sample
from running import Service

from ops import demo, up
from startup import load_settings

DEMOS = {
    "numbers": (
        sample.labelled("target", [str(n) for n in range(30)]),
        ["Root mean squared error", "mean absolute error"],
    ),
    "labels": (sample.labelled("label", ["cold"] * 10 + ["cold|warm"] * 10 + ["warm"] * 10), ["Macro F1", "right"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DEMOS)
def test_the_demo_goes_through_its_steps_with_every_kind_of_label(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    files, wanted = DEMOS[kind]
    archive = tmp_path / f"{kind}.zip"
    archive.write_bytes(sample.zipped(files))
    for name, value in service.environment.items():
        monkeypatch.setenv(name, value)
    arguments = ["--data", str(archive), "--backbone", "vgg16", "--features-from", "block1", "--image-size", "32"]
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    settings = load_settings()
    with up.client(settings) as api:
        demo._demonstrate(api, demo._arguments(), settings)
    told = capsys.readouterr().out
    for shown in ("ImageNet weights are not available", *wanted, "/docs", "curl"):
        assert shown in told
