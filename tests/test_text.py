"""Text of foreign files neither controls a terminal nor shows a password, wherever it is printed."""

import io
import json
import pickle

import pytest
from rich.table import Table

from findrec.datasets.folder.manifest import MANIFEST_NAME, SourceEntry, read_manifest, repair_hint
from findrec.errors import DivergedError, FindRecError
from findrec.progress import Console, progress, say
from findrec.text import printable, redacted

ATTACK = "a\x1b]0;owned\x07\x1b[2Jb\x9b31m\r\u202egpj"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://ann:pass@host/x", "http://***@host/x"),
        ("http://ann:p@ss@host:80", "http://***@host:80"),
        ("http://ann:p/ss@host/x", "http://***@host/x"),
        ("https://a-token@host/x and s3://key:secret@bucket/y", "https://***@host/x and s3://***@bucket/y"),
        ("http://h/f?token=abc&n=1", "http://h/f?token=***&n=1"),
        ("http://h/f?a=1&X-Amz-Signature=0f&X-Amz-Credential=K%2F1", None),
        ("http://h/f?sv=1&sig=a%2Bb", "http://h/f?sv=1&sig=***"),
        ("'http://h/f?access_token=abc': no", "'http://h/f?access_token=***': no"),
        ("http://h/f?API-KEY=abc#access_token=d", "http://h/f?API-KEY=***#access_token=***"),
        ("http://host:8000/a?mail=a@b", "http://host:8000/a?mail=a@b"),
        ("http://host:8000 says: ask a@b", "http://host:8000 says: ask a@b"),
        ("training.tokens=128 x@y.z git@host:path", "training.tokens=128 x@y.z git@host:path"),
    ],
)
def test_credentials_of_addresses_are_hidden(text, shown):
    assert redacted(text) == (shown or "http://h/f?a=1&X-Amz-Signature=***&X-Amz-Credential=***")
    assert redacted(redacted(text)) == redacted(text)


def test_control_characters_are_escaped_and_the_rest_kept():
    assert printable(ATTACK) == r"a\x1b]0;owned\x07\x1b[2Jb\x9b31m\r\u202egpj"
    assert printable("ä\t漢字 👩\u200d🔬\n— ﷺ") == "ä\t漢字 👩\u200d🔬\n— ﷺ"
    assert printable("f\udcff").encode() == rb"f\udcff"  # a file name that is not UTF-8


def test_errors_are_printable_in_every_process():
    error = FindRecError(f"{ATTACK} http://ann:pass@host")
    assert str(error) == printable(ATTACK) + " http://***@host"
    assert str(pickle.loads(pickle.dumps(DivergedError(ATTACK)))) == printable(ATTACK)
    assert repr(FindRecError()) == "FindRecError()"


def test_progress_and_tables_are_printable(capsys, monkeypatch):
    monkeypatch.delenv("FINDREC_QUIET", raising=False)
    say(ATTACK)
    with progress(ATTACK, total=2, unit=ATTACK) as bar:
        bar.note(file=ATTACK)
    out = io.StringIO()
    table = Table(ATTACK)
    table.add_row(ATTACK)
    Console(file=out, width=200, force_terminal=True).print(table, ATTACK, f"http://a:b@{ATTACK}")
    said = capsys.readouterr().out + out.getvalue()
    assert said.count("owned") > 5
    for bad in ("\x1b]", "\x07", "\x1b[2J", "\x9b", "\r", "\u202e", "a:b@"):
        assert bad not in said


def test_a_foreign_manifest_is_only_text(tmp_path):
    folder = tmp_path / "x; rm -rf $HOME"
    folder.mkdir()
    (folder / MANIFEST_NAME).write_text(json.dumps({"schema_version": ATTACK}))
    with pytest.raises(FindRecError) as refused:
        read_manifest(folder)
    assert "\x1b" not in str(refused.value)
    assert "findrec prepare 'x; rm -rf $HOME' --force" in str(refused.value)
    assert repair_hint("synthetic-`id`") == "Make it again with: findrec synthesize --profile '`id`' --force"


def test_a_manifest_keeps_no_credentials():
    entry = SourceEntry(source="s", place="https://ann:pass@host/x.zip?sig=1", sha256="", bytes=1)
    assert entry.place == "https://***@host/x.zip?sig=***"
