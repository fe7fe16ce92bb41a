from __future__ import annotations

from ops.document import TARGET, settings_page
from settings import Settings


def test_every_setting_is_documented_as_it_is() -> None:
    """After a change: python -m ops.document."""
    assert TARGET.read_text() == settings_page()
    assert all(field.description for field in Settings.model_fields.values())
