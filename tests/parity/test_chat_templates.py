"""The committed conversations are what transformers still makes of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent.parent / "golden"

pytestmark = pytest.mark.parity


def test_chat_goldens_are_current(monkeypatch):
    monkeypatch.syspath_prepend(str(GOLDEN))
    sys.modules.pop("make_chat", None)
    import make_chat

    assert make_chat.golden() == json.loads((GOLDEN / "chat.json").read_text(encoding="utf-8"))
